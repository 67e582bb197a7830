"""Measure what recording and the schedule guard cost a step: 8 forked ranks, gloo, the preset `tiny`, idle steps.

    python benchmarks/bench_engine.py [--ranks 8] [--rounds 6] [--json FILE]

Every rank has one engine per row. All ranks run 8 steps of each row in turn, for several rounds, so that a busy machine
slows all rows alike; the median round counts. Steps of dummy batches are the fastest steps, so the shares are upper
bounds. The last row is the first one with TORCH_DISTRIBUTED_DEBUG=DETAIL, PyTorch's own check of collectives.

A recorder costs so little that the difference of two step times is mostly noise. So its cost is also computed: the
processor time of one event in the communicator's code, with and without a recorder, times the number of events of a
step, divided by the time of a step. The cost of agreeing is the processor time of the plan, of the agreed result, and
of the guard's check of each collective, here and for a model of 60 layers. It leaves out that an all-reduce of a few
hundred bytes gets some more rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hybrid_moe_ref.config import EngineConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.step.plan import StepPlan, StepSchedules
from hybrid_moe_ref.engine.step.protocol import protocol_of
from hybrid_moe_ref.parallel.checks.guard import ScheduleGuard
from hybrid_moe_ref.parallel.checks.store import loopback_store
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import Halt
from hybrid_moe_ref.parallel.observer import Collective, NullObserver, Observer
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter, ForwardContext
from repro.lab.settings import RunSettings
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import read

AGREE_SHARE, STRICT_MS = 0.01, 4.0
DEEP_LAYERS, DEEP_US = 60, 100.0  # of the largest preset, where a step on GPUs takes some milliseconds
"""Limits for the cost of the checks: share of a step, and ms per collective at 8 ranks on 2 cores. Beyond: exit 1."""

STEPS = 8  # of a round: few, so that rounds of all rows lie close together
CHECKS = {
    "nothing": "observe",
    "recorded": "observe",
    "recorded, agree": "agree",
    "recorded, strict": "strict",
    "nothing, DETAIL": "observe",
}


def run_rank(rank: int, num_ranks: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of each round by row, the events of a step, and the microseconds of an event by observer."""
    torch.set_num_threads(1)
    server = RunSettings("any", "control", num_ranks=num_ranks).server()
    server = replace(server, engine=replace(server.engine, unfinished_interval=STEPS))
    meeting = dist.FileStore(str(folder / "store"), num_ranks)
    store = loopback_store(meeting, rank, num_ranks)
    first = Communicator.connect(server.parallel, rank, store=store, timeout_s=300)
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    detailed = {
        name: dist.new_group(list(first.members(name)), backend="gloo", group_desc=name) for name in first._groups
    }
    engines = {}
    for row, checks in CHECKS.items():
        observer: Observer = NullObserver()
        if row.startswith("recorded"):
            observer = Recorder.open(folder / f"{row}-{rank}.wit", rank, num_ranks)
        groups = detailed if "DETAIL" in row else first._groups
        comm = Communicator(rank, first.device, groups, observer, dist.PrefixStore(row, store))
        engines[row] = Engine(replace(server, checks=checks, allow_unsafe=True), comm)
    path = folder / f"recorded-{rank}.wit"
    before = read(path).num_events
    seconds: dict[str, list[float]] = {row: [] for row in CHECKS}
    for _ in range(rounds + 1):
        for row, engine in engines.items():
            begin = time.perf_counter()
            engine.serve([])
            seconds[row].append(time.perf_counter() - begin)
    events = (read(path).num_events - before) / (rounds + 1) / STEPS
    return {
        "seconds": {row: times[1:] for row, times in seconds.items()},  # the first round warms up
        "events": events,
        "event_us": {row: event_us(engines[row].comm) for row in ("nothing", "recorded")} if rank == 0 else {},
        "agree_us": agree_us(engines["recorded, agree"].runner.schedules, num_ranks) if rank == 0 else 0.0,
    }


def agree_us(schedules: StepSchedules, num_ranks: int, num_calls: int = 50, num_repeats: int = 60) -> float:
    """Return the processor time in us that agreeing adds to a step on one rank, without the all-reduce itself.

    The fastest of many short loops counts.
    """
    guard, context = ScheduleGuard(0, Halt(None)), ForwardContext(sizes=(1,) * num_ranks)
    schedule, protocol = schedules.whole(asks_unfinished=False), protocol_of(EngineConfig())
    issued = [Collective(*entry, context.ep_sizes) for entry in schedule]
    times = []
    for step in range(num_repeats):
        begin = time.thread_time_ns()
        for _ in range(num_calls):
            plan = StepPlan(step, 1, 1, schedule_hash=schedules.hash(asks_unfinished=False))
            guard.begin(step, schedules.whole(asks_unfinished=False))
            protocol.resolve([[number] * num_ranks for number in protocol.column(plan)])
            guard.agree("ep", context.ep_sizes)
            for collective in issued:
                _ = context.ep_sizes  # as a layer does
                guard.admit(collective)
        times.append(time.thread_time_ns() - begin)
    return min(times) / num_calls / 1e3


def event_us(comm: Communicator, num_calls: int = 500, num_repeats: int = 60) -> float:
    """Return the processor time in us of one event that the communicator reports: the fastest of many short loops."""
    sizes = tuple(range(len(comm.members("ep"))))

    def dispatch() -> None:
        event = Collective("ep", "all_gather_v", "layers.0.moe", sizes, "uint8")
        comm._enter(event)
        comm.observer.leave(event)

    times = []
    for _ in range(num_repeats):
        begin = time.thread_time_ns()
        for _ in range(num_calls):
            dispatch()
        times.append(time.thread_time_ns() - begin)
    return min(times) / num_calls / 2 / 1e3


def measure(num_ranks: int, rounds: int) -> dict[str, Any]:
    """Run all ranks. Return the measurements of rank 0, with the milliseconds of a step from the median round."""
    with tempfile.TemporaryDirectory() as name:
        folder, pids = Path(name), []
        for rank in range(num_ranks):
            pid = os.fork()
            if pid == 0:
                try:
                    measured = run_rank(rank, num_ranks, rounds, folder)
                    (folder / f"rank-{rank}.json").write_text(json.dumps(measured))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        measured: dict[str, Any] = json.loads((folder / "rank-0.json").read_text())
    step_ms = {row: statistics.median(times) / STEPS * 1e3 for row, times in measured["seconds"].items()}
    # Rounds of two rows run one after the other, so a busy machine changes their ratio less than that of the medians.
    base = measured["seconds"]["nothing"]
    ratios = {
        row: statistics.median(ours / theirs for ours, theirs in zip(times, base, strict=True))
        for row, times in measured["seconds"].items()
    }
    extra_ms = {
        row: statistics.median(ours - theirs for ours, theirs in zip(times, base, strict=True)) / STEPS * 1e3
        for row, times in measured["seconds"].items()
    }
    return {**measured, "step_ms": step_ms, "ratio": ratios, "extra_ms": extra_ms}


def recorder_cost(measured: dict[str, Any]) -> dict[str, float]:
    """Compute what the recorder adds to a step, from the cost of an event and the number of events."""
    event_us = measured["event_us"]["recorded"] - measured["event_us"]["nothing"]
    step_us = event_us * measured["events"]
    return {
        "event_us": round(event_us, 3), "events_per_step": round(measured["events"], 1), "step_us": round(step_us, 1),
        "share": step_us / 1e3 / measured["step_ms"]["nothing"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    arguments = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    measured = measure(arguments.ranks, arguments.rounds)
    collectives = 1 + 2 * 8  # a step of 8 layers
    base = measured["step_ms"]["nothing"]
    rows: list[dict[str, Any]] = [
        {
            "row": row, "step_ms": round(ms, 2), "ratio": round(measured["ratio"][row], 4),
            "extra_ms_per_collective": round(measured["extra_ms"][row] / collectives, 3),
        }
        for row, ms in measured["step_ms"].items()
    ]  # fmt: skip
    print(
        f"{arguments.ranks} ranks, {os.cpu_count()} cores, torch {torch.__version__}, gloo, {arguments.rounds} rounds"
    )
    print(f"{'row':18} {'step ms':>9} {'ratio':>8} {'extra ms a collective':>23}")
    for row in rows:
        print(f"{row['row']:18} {row['step_ms']:>9} {row['ratio']:>8} {row['extra_ms_per_collective']:>23}")
    cost = recorder_cost(measured)
    print(
        f"recorder: {cost['event_us']} us an event, {cost['events_per_step']:g} events a step: "
        f"{cost['step_us']} us of {base * 1e3:.0f} us, {cost['share']:.4%}"
    )
    agree_share = measured["agree_us"] / 1e3 / base
    deep = [entry for layer in range(DEEP_LAYERS) for entry in AllGatherReduceScatter.plan(f"layers.{layer}.moe")]
    deep_us = agree_us(StepSchedules("dp", tuple(deep)), arguments.ranks)
    strict_ms = next(row["extra_ms_per_collective"] for row in rows if CHECKS[row["row"]] == "strict")
    kept = {"agree": agree_share <= AGREE_SHARE, "deep": deep_us <= DEEP_US, "strict": strict_ms <= STRICT_MS}
    results = {name: "ok" if ok else "MISSED" for name, ok in kept.items()}
    print(
        f"agreeing: {measured['agree_us']:.1f} us of {base * 1e3:.0f} us a step, {agree_share:.4%}; "
        f"limit {AGREE_SHARE:.0%}: {results['agree']}"
    )
    print(f"agreeing on {DEEP_LAYERS} layers: {deep_us:.1f} us a step; limit {DEEP_US:g} us: {results['deep']}")
    print(f"strict: {strict_ms} ms a collective; limit {STRICT_MS:g} ms: {results['strict']}")
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        document = {
            **machine,
            "torch": torch.__version__,
            "commit": commit,
            "ranks": arguments.ranks,
            "rows": rows,
            "recorder": cost,
            "agree": {"step_us": round(measured["agree_us"], 1), "share": agree_share},
            "agree_deep": {"layers": DEEP_LAYERS, "step_us": round(deep_us, 1)},
            "limits": {
                "agree_share": AGREE_SHARE,
                "deep_us": DEEP_US,
                "strict_ms_per_collective": STRICT_MS,
                "kept": kept,
            },
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if not all(kept.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
