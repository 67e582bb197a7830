"""How often `diagnose` and other analysers of recorder dumps name the right ranks, how many others, how fast.

    python benchmarks/bench_diagnose.py [--folder DIR:RANKS:CLASS …] [--nvrx PYTHON] [--no-live] [--scale RANKS,…]

The dumps are made up by the tests' writer in four kinds of NCCL hangs, each with any of four ranks at fault, and taken
from six live gloo jobs (tests/support/jobs/live_gloo.py). `--folder` adds labelled dumps, for example NVIDIA's
(`_dumps:12,14:stall`); `--nvrx` is a Python that has nvidia-resiliency-ext. A tool is right where the ranks that it
names are exactly those at fault; `diagnose` has to give the class as well, which the others have no words for.
`innocent` counts the other ranks that are named, `findings` the places that a reader is sent to. Exits with 1 where
`diagnose` names an innocent rank.

`--scale` gives `python -m repro diagnose`, from its start to its end, the dumps of larger jobs: 2,000 operations of two
groups on each rank, the last of which one rank has not queued. Time and memory should be linear in the ranks. The
processor time includes that of child processes; the memory is that of the largest process alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests" / "support"
sys.path[:0] = [str(TESTS / "evidence"), str(TESTS / "jobs")]

import hangs  # noqa: E402
from foreign import call, dump  # noqa: E402
from live_gloo import FAULTS  # noqa: E402

from repro.ingest.read import read  # noqa: E402
from repro.verdict.partial import diagnose  # noqa: E402

MADE_UP = {
    "sizes differ": (hangs.different_sizes, 2, "deadlock"),
    "never queued": (hangs.one_is_absent, 2, "inconclusive"),
    "device stopped": (hangs.device_stopped, 3, "stall"),
    "host stopped": (hangs.host_stopped, 3, "stall"),
}
NUM_ENTRIES = 2000
MEASURED = """
import re, sys
from pathlib import Path
from repro.__main__ import main
main()
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1], file=sys.stderr)
"""
"""`python -m repro`, which then prints the most memory that it had, in KiB. Other measures count what it replaced."""
LIVE = {"clean": "clean", "straggler": "inconclusive"}  # the others are deadlocks


@dataclass(frozen=True)
class Job:
    kind: str
    folder: Path
    ranks: frozenset[int]
    verdict: str


@dataclass(frozen=True)
class Answer:
    """The answer of one tool about one job: the ranks that it names, and how many problems it reports (`findings`).

    failed: whether the tool ended with an error
    """

    verdict: str
    ranks: frozenset[int]
    findings: int
    seconds: float
    failed: bool = False


def made_up(root: Path) -> Iterator[Job]:
    for kind, (make, at_fault, verdict) in MADE_UP.items():
        for shift in range(4):
            names = [(rank + shift) % 4 for rank in range(4)]
            folder = root / kind.replace(" ", "_") / str(shift)
            folder.mkdir(parents=True)
            for name, data in make(names).files.items():
                (folder / name).write_bytes(_with_status(data))
            yield Job(kind, folder, frozenset({names[at_fault]}), verdict)


def _with_status(data: bytes) -> bytes:
    """Add the counters of each group to a made-up dump. torch's dumps have them, and nvrx needs them."""
    content = pickle.loads(data)
    if not content["pg_status"]:
        for entry in content["entries"]:
            row = content["pg_status"].setdefault(str(entry["pg_id"]), {
                "last_enqueued_collective": -1, "last_started_collective": -1, "last_completed_collective": -1,
            })  # fmt: skip
            row["last_enqueued_collective"] = entry["collective_seq_id"]
            if entry["state"] == "completed":
                row["last_completed_collective"] = entry["collective_seq_id"]
    return pickle.dumps(content, protocol=2)


def live(root: Path) -> Iterator[Job]:
    """Run the six live gloo jobs at the same time, because they mostly sleep. Yield each job with its dumps."""
    quiet = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    jobs = {
        fault: subprocess.Popen(
            [sys.executable, str(TESTS / "jobs" / "live_gloo.py"), fault, str(root / fault)], env=quiet
        )
        for fault in FAULTS
    }
    for fault, job in jobs.items():
        job.wait(timeout=180)
        ranks = frozenset() if fault == "clean" else frozenset({2})
        for look in ("pickle0", "json0"):
            yield Job(f"gloo {look[:-1]}", root / fault / look, ranks, LIVE.get(fault, "deadlock"))


def ask_diagnose(job: Job) -> Answer:
    start = time.perf_counter()
    diagnosis = diagnose(read([job.folder]).records)
    seconds = time.perf_counter() - start
    named = frozenset(diagnosis.culprits or diagnosis.suspects)
    return Answer(diagnosis.verdict, named, 0 if diagnosis.verdict == "clean" else 1, seconds)


def _prefix(job: Job) -> str:
    """Return the beginning that the file names of a job's dumps have in common. Raises ValueError without dumps."""
    names = [path.stem for path in job.folder.iterdir() if path.stem[-1:].isdigit()]
    if not names:
        raise ValueError(f"{job.folder}: no dumps; a live job on a loaded machine may end before it is asked for them")
    return names[0].rstrip("0123456789")


def ask_torchfrtrace(job: Job) -> Answer:
    """Run torchfrtrace. Its answer is the ranks in its lines "missing ranks" and "Culprit rank".

    It cannot read JSON dumps. The time includes the start of the program.
    """
    prefix = _prefix(job)
    program = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(job.folder), "-p", prefix]
    start = time.perf_counter()
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - start
    text = done.stdout + done.stderr
    ranks = {int(rank) for rank in re.findall(r"Culprit rank (\d+)", text)}
    for row in re.findall(r"missing ranks: \{([\d, ]+)\}", text):
        ranks |= {int(rank) for rank in row.split(",")}
    findings = len(re.findall(r"(?:Collective|ranks joining collective, )?sequence number: \d+", text))
    return Answer("", frozenset(ranks), findings, seconds, done.returncode != 0)


def ask_nvrx(job: Job, python: Path) -> Answer:
    """Run nvrx. Its answer is the ranks in the last column of its table of hanging groups; each row is a finding.

    The time includes the start of the program.
    """
    prefix = _prefix(job)
    module = "nvidia_resiliency_ext.attribution.trace_analyzer.fr_attribution"
    program = [str(python), "-m", module, "--fr-path", str(job.folder), "-p", f"{prefix}*", "--emit-stdout"]
    start = time.perf_counter()
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - start
    rows = [row.rpartition("|")[2] for row in done.stdout.splitlines() if re.match(r"\d+ +\|", row)]
    ranks = frozenset(int(rank) for row in rows for rank in re.findall(r"\d+", row))
    return Answer("", ranks, len(rows), seconds, done.returncode != 0)


TOOLS: dict[str, Callable[[Job], Answer]] = {"diagnose": ask_diagnose, "torchfrtrace": ask_torchfrtrace}


def rows(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return one row of the table for each kind of job and each tool."""
    answers = [(job, tool, ask(job)) for job in jobs for tool, ask in TOOLS.items()]
    table = []
    for kind in dict.fromkeys(job.kind for job in jobs):
        for tool in TOOLS:
            own = [(job, answer) for job, name, answer in answers if job.kind == kind and name == tool]
            table.append({"kind": kind, "tool": tool, "jobs": len(own), **_score(tool, own)})
    return table


def _score(tool: str, own: Sequence[tuple[Job, Answer]]) -> Mapping[str, Any]:
    right = [
        answer.ranks == job.ranks and not answer.failed and (tool != "diagnose" or answer.verdict == job.verdict)
        for job, answer in own
    ]
    return {
        "right": sum(right),
        "innocent": sum(len(answer.ranks - job.ranks) for job, answer in own),
        "findings_a_job": round(sum(answer.findings for _, answer in own) / len(own), 1),
        "failed": sum(answer.failed for _, answer in own),
        "seconds_a_job": round(sum(answer.seconds for _, answer in own) / len(own), 3),
    }


def scale(num_ranks: int, scratch: Path) -> dict[str, Any]:
    """Run `diagnose` on a job of this many ranks. Return its seconds, processor seconds and peak memory in MB."""
    folder = scratch / str(num_ranks)
    folder.mkdir(parents=True)
    groups = {"0": ("default_pg", range(num_ranks)), "1": ("ep", range(num_ranks))}
    frames = [{"name": name, "filename": "model.py", "line": 7} for name in ("moe", "layer", "main")]
    entries = []
    for n in range(NUM_ENTRIES):
        op, group = (("all_reduce", (0, "0", "default_pg")), ("all_gather", (1, "1", "ep")))[n % 2]
        entry = call(n // 2 + 1, op, group=group, done=n < NUM_ENTRIES - 1, at_ms=n)
        entries.append({**entry, "frames": list(frames)})
    whole, absent = dump(entries, groups), dump(entries[:-1], groups)
    for rank in range(num_ranks):
        (folder / f"nccl_trace_rank_{rank}").write_bytes(absent if rank == 3 else whole)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", MEASURED, "diagnose", "--json", str(folder)], capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "ranks": num_ranks, "operations_a_rank": NUM_ENTRIES, "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2), "mb": int(process.stderr) >> 10,
        "right": json.loads(process.stdout)["suspects"] == [3],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", default=[], metavar="DIR:RANKS:CLASS")
    parser.add_argument("--nvrx", type=Path, metavar="PYTHON")
    parser.add_argument("--no-live", action="store_true")
    parser.add_argument("--scale", default="16,64,256,1024", metavar="RANKS,…", help="'' for none")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.nvrx:
        TOOLS["nvidia-resiliency-ext"] = partial(ask_nvrx, python=args.nvrx)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [*made_up(Path(scratch) / "made_up"), *(() if args.no_live else live(Path(scratch) / "live"))]
        for text in args.folder:
            path, ranks, verdict = text.rsplit(":", 2)
            jobs.append(Job("labelled", Path(path), frozenset(map(int, ranks.split(","))), verdict))
        table = rows(jobs)
        sizes = [scale(int(text), Path(scratch) / "scale") for text in args.scale.split(",") if text]
    print(f"{'kind':16}{'tool':24}{'right':>8}{'innocent':>10}{'findings':>10}{'failed':>8}{'s a job':>9}")
    for row in table:
        print(f"{row['kind']:16}{row['tool']:24}{row['right']:>5}/{row['jobs']:<2}{row['innocent']:>10}"
              f"{row['findings_a_job']:>10}{row['failed']:>8}{row['seconds_a_job']:>9}")  # fmt: skip
    for row in sizes:
        print(f"{row['ranks']} ranks: {row['seconds']} s, {row['cpu_seconds']} s of processors, {row['mb']} MB")
    if args.json:
        import torch

        system = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(json.dumps({"system": system, "rows": table, "scale": sizes}, indent=1) + "\n")
    return int(any(row["innocent"] for row in table if row["tool"] == "diagnose"))


if __name__ == "__main__":
    sys.exit(main())
