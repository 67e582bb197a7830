"""Measure how long a verdict takes, by number of ranks, and what one event costs the rank that records it.

    python benchmarks/bench_verdict.py [--ranks 64 256 1024] [--events 2000] [--json FILE]

Each row is the metadata_rebuild hang (one all_reduce too many on the ranks with live requests) on witnesses of
``--events`` events a rank: parse is bytes to witnesses, judge is witnesses to verdict, in CPU seconds of one core.
A row is written only if the verdict is right. Recording is timed beside the same loop with an observer that does
nothing. Each row has its own process, to measure its peak memory.

Exits with 1 if a row of at most 1,024 ranks x 2,000 events takes more than 10 s or 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective, NullObserver, Observer, ScheduleEntry
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import parse
from repro.trace.witness.format import Geometry, Identity, pack_header
from repro.verdict import judge

MOST_S, MOST_MIB = 10.0, 1024
MOST_EVENTS = 1024 * 2000  # of all ranks, for which these hold

LAYERS = 12
IDLE = 4  # every fourth rank


def step_calls(num_ranks: int, step: int) -> list[Collective]:
    """Yield the collectives of a step: one agreement, then dispatch and combine of every layer."""
    sizes = tuple((rank * 7 + step) % 64 for rank in range(num_ranks))
    calls = [Collective("dp", "all_reduce", "", (4 * num_ranks,), "int32", "sum")]
    for layer in range(LAYERS):
        calls.append(Collective("ep", "all_gather_v", f"layers.{layer}.mlp", sizes, "bfloat16"))
        calls.append(Collective("ep", "reduce_scatter_v", f"layers.{layer}.mlp", sizes, "bfloat16", "sum"))
    return calls


def record(rank: int, num_ranks: int, num_events: int, steps: list[list[Collective]]) -> bytes:
    """Return the witness bytes of one rank that ends in the hang."""
    shape = Geometry(num_events + num_events % 2, 16_384, 1 << 16, 4)
    writer = Identity(rank, num_ranks, "bench", "host", "boot", 1000 + rank)
    buffer = bytearray(shape.file_bytes)
    header = pack_header(writer, shape)
    buffer[: len(header)] = header
    now = [0]

    def clock() -> int:
        now[0] += 1000
        return now[0]

    recorder = Recorder(buffer, writer, shape, clock=clock)
    recorder.groups({"dp": range(num_ranks), "ep": range(num_ranks)})
    recorder.phase("serve")
    plan = tuple(ScheduleEntry(call.group, call.op, call.layer) for call in steps[0])
    for number, calls in enumerate(steps):
        recorder.begin_step(number, plan, 1)
        if number == len(steps) - 1:
            recorder.enter(calls[0])
            recorder.leave(calls[0])
            live = rank % IDLE != 0
            recorder.enter(
                Collective("dp", "all_reduce", "layers.0.linear_attn", (4,), "int32", "sum") if live else calls[1]
            )
            break
        for call in calls:
            recorder.enter(call)
            recorder.leave(call)
    return bytes(buffer)


def bench_verdict(num_ranks: int, num_events: int) -> dict[str, Any]:
    """Measure one row: CPU seconds to parse and to judge, and the peak memory of this process."""
    num_steps = max(2, num_events // (2 * (2 * LAYERS + 1) + 1))
    steps = [step_calls(num_ranks, step) for step in range(num_steps)]
    witnesses = {}
    parse_s = 0.0
    for rank in range(num_ranks):
        data = record(rank, num_ranks, num_events, steps)
        start = time.process_time()
        witnesses[rank] = parse(data, f"rank{rank:04d}.wit")
        parse_s += time.process_time() - start
    start = time.process_time()
    verdict = judge(witnesses, num_ranks=num_ranks, now_ns=10**12, quiet_window_s=1.0)
    judge_s = time.process_time() - start
    live = tuple(rank for rank in range(num_ranks) if rank % IDLE)
    if (verdict.verdict, verdict.cause, verdict.culprits) != ("deadlock", "extra", live):
        raise SystemExit(f"{num_ranks} ranks: the verdict is wrong: {verdict.verdict} {verdict.cause}")
    events = sum(witness.num_events for witness in witnesses.values())
    return {
        "ranks": num_ranks, "events": events, "parse_s": round(parse_s, 2), "judge_s": round(judge_s, 2),
        "us_per_event": round((parse_s + judge_s) / events * 1e6, 2),
        "peak_mib": peak_mib(),
    }  # fmt: skip


def peak_mib() -> int:
    """Return the peak memory of this process in MiB. ru_maxrss would start at the parent's at the time of the fork."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM"))


def in_own_process(num_ranks: int, num_events: int) -> dict[str, Any]:
    """Measure one row in a process of its own."""
    command = [sys.executable, __file__, "--row", str(num_ranks), "--events", str(num_events)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        raise SystemExit(answer.returncode)
    row: dict[str, Any] = json.loads(answer.stdout)
    return row


def beyond(rows: list[dict[str, Any]]) -> list[str]:
    """Return a line for each limit that a row exceeds."""
    lines = []
    for row in rows:
        seconds = row["parse_s"] + row["judge_s"]
        if row["events"] <= MOST_EVENTS and (seconds > MOST_S or row["peak_mib"] > MOST_MIB):
            limits = f"more than {MOST_S:g} s or {MOST_MIB} MiB"
            lines.append(f"{row['ranks']} ranks take {seconds:.2f} s and {row['peak_mib']} MiB, {limits}")
    return lines


def bench_recorder(num_rounds: int = 2000, num_repeats: int = 40) -> dict[str, float]:
    """Return the processor time of one event in us: the fastest of many short loops, because the machine is shared.

    Called directly; ``bench_engine.py`` measures it in the communicator's own code.
    """
    calls = step_calls(8, 0)[:5]

    def best(observer: Observer) -> float:
        times = []
        for _ in range(num_repeats):
            start = time.thread_time()
            for _ in range(num_rounds // len(calls)):
                for call in calls:
                    observer.enter(call)
                    observer.leave(call)
            times.append(time.thread_time() - start)
        return min(times) / (num_rounds // len(calls) * len(calls) * 2) * 1e6

    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder.open(Path(folder) / "rank000.wit", 0, 8)
        recorder.groups({"dp": range(8), "ep": range(8)})
        return {"recorder_us": round(best(recorder), 3), "null_us": round(best(NullObserver()), 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, the machine and the commit")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(bench_verdict(arguments.row, arguments.events)))
        return 0
    recorder = bench_recorder()
    rows = [in_own_process(num_ranks, arguments.events) for num_ranks in arguments.ranks]
    ratio = round(rows[-1]["us_per_event"] / rows[0]["us_per_event"], 2) if len(rows) > 1 else 0.0
    failures = beyond(rows)
    hardware = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    print(f"Python {platform.python_version()} on {hardware}")
    cost = recorder["recorder_us"] - recorder["null_us"]
    print(f"recording: {cost:.2f} us an event ({recorder['recorder_us']} us in a loop of {recorder['null_us']} us)")
    print("ranks    events   parse s   judge s   us/event   peak MiB")
    for row in rows:
        print(
            f"{row['ranks']:>5} {row['events']:>9} {row['parse_s']:>9} {row['judge_s']:>9} {row['us_per_event']:>10}"
            f" {row['peak_mib']:>10}"
        )
    if ratio:
        print(f"cost of an event, {rows[-1]['ranks']} ranks to {rows[0]['ranks']}: {ratio} times (1 is linear)")
    for line in failures:
        print(f"beyond the limit: {line}")
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        document = {
            "hardware": hardware, "system": platform.platform(), "versions": {"python": platform.python_version()},
            "commit": commit, **recorder, "rows": rows, "cost_ratio": ratio, "beyond": failures,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
