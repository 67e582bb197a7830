"""Measure what `record` costs a program: microseconds a collective, and the share of a step.

    python benchmarks/bench_record.py [--pairs 80] [--processes 2] [--only PROGRAM] [--json FILE]

Each collective of recorded_steps.py runs in three processes at once: plain, recorded by the compiled hooks, and
recorded in Python. They take turns, in an order drawn for each turn, so the machine is in the same state for all three.
A turn gives two differences from plain.

A step (ddp, fsdp, experts) takes milliseconds, and two processes differ by more than the cost that is looked for. So
one process runs pairs of steps, of which one, drawn, is recorded. The processor time of the recorder's background
thread, as a share of the wall time, is added to each difference.

The table shows the medians with a 95 % confidence interval, from resampling whole turns or pairs; every process is
started anew `--processes` times, because a start can be lucky.

Exits with 1 if the lower end of an interval is above the limit: 2 us a collective, 1 % of a step. Only compiled hooks
have a limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import commit, cpu, versions, write
from recorded_steps import PROGRAMS

from repro.attach.record import compiled
from repro.commands.record import SITE

MOST_US, MOST_SHARE = 2.0, 0.01
COLLECTIVES = ("all_reduce", "asynchronous", "all_gather", "barrier", "gloo")
WAYS = ("plain", "compiled", "python")
TURN_S = 0.05
"""How long a process runs in one turn."""

PAIRS_S = 0.4
"""How long pairs of steps run for one turn of a collective."""

STEPS = Path(__file__).with_name("recorded_steps.py")


class Runner:
    """A process that runs a program on request."""

    def __init__(self, program: str, way: str, folder: Path) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HMR_RECORD")}
        env |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if way != "plain":
            env |= {"HMR_RECORD": str(folder), "PYTHONPATH": str(SITE)}
        if way == "python":
            env["HMR_RECORD_PURE"] = "1"
        self._folder = None if way == "plain" else folder
        self._process = subprocess.Popen(
            [sys.executable, str(STEPS), program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, count: int) -> float:
        """Run the program ``count`` times; returns the seconds of one run."""
        return float(self._ask(str(count))) / count

    def differences(self, num_pairs: int) -> list[float]:
        """Run pairs of steps of which one is recorded; returns the relative difference of each pair."""
        return json.loads(self._ask(f"pairs {num_pairs}"))

    def thread_share(self) -> float:
        """Return the share of the time that the recorder's background thread computes."""
        return float(self._ask("thread"))

    def _ask(self, request: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{request}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate(timeout=60)
        if self._folder is not None and not list(self._folder.glob("events/*.wit")):
            raise SystemExit("nothing was recorded")


def turns(program: str, num_pairs: int, rng: random.Random) -> list[dict[str, float]]:
    """Return, for each turn, the seconds of one run with each way to record: way -> seconds."""
    with tempfile.TemporaryDirectory() as folder:
        runners = {way: Runner(program, way, Path(folder) / way) for way in WAYS}
        for runner in runners.values():
            runner.seconds(1)
        count = max(1, round(TURN_S / min(runner.seconds(3) for runner in runners.values())))
        rows = []
        for _ in range(num_pairs):
            order = rng.sample(WAYS, len(WAYS))
            times = {way: runners[way].seconds(count) for way in order}
            rows.append({way: times[way] for way in WAYS})
        for runner in runners.values():
            runner.end()
    return rows


def shares(program: str, num_turns: int, way: str) -> tuple[list[float], float]:
    """Return what recording adds to a step in each pair of steps, as a share of the step; and a step's seconds."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(program, way, Path(folder))
        runner.seconds(3)  # the first steps allocate, and DDP rebuilds its buckets in the second
        seconds, thread = runner.seconds(10), runner.thread_share()
        differences = runner.differences(round(num_turns * PAIRS_S / (2 * seconds)))
        runner.end()
    return [difference + thread for difference in differences], seconds


def interval(values: list[float], rng: random.Random, num_samples: int = 2000) -> tuple[float, float, float]:
    """Return the median of the values, and the ends of its 95 % confidence interval by resampling."""
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(num_samples))
    return statistics.median(values), medians[num_samples // 40], medians[-num_samples // 40]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=80)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", choices=PROGRAMS, action="append")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if problem := compiled.build():
        raise SystemExit(f"the hooks cannot be compiled: {problem}")
    rng = random.Random(0)
    results, missed = [], False
    for program in args.only or PROGRAMS:
        is_collective = program in COLLECTIVES
        if is_collective:
            rows = [row for _ in range(args.processes) for row in turns(program, args.pairs, rng)]
            plain_us = statistics.median(row["plain"] for row in rows) * 1e6
        for way in WAYS[1:]:
            if is_collective:
                unit, most = "us", MOST_US
                middle, low, high = interval([(row[way] - row["plain"]) * 1e6 for row in rows], rng)
                text = f"{middle:+.2f} us [{low:+.2f}, {high:+.2f}]"
            else:
                unit, most = "share", MOST_SHARE
                runs = [shares(program, args.pairs, way) for _ in range(args.processes)]
                middle, low, high = interval([share for differences, _ in runs for share in differences], rng)
                plain_us = statistics.median(seconds for _, seconds in runs) * 1e6 / (1 + middle)
                text = f"{middle:+.2%} [{low:+.2%}, {high:+.2%}]"
            above = way == "compiled" and program != "gloo" and low > most
            missed |= above
            print(f"{program:13} {plain_us:9.1f} us plain, {way:8} {text}{'  above the limit' if above else ''}")
            result = {"program": program, "way": way, "plain_us": plain_us, "unit": unit}
            results.append({**result, "median": middle, "low": low, "high": high})
    if args.json:
        document = {"hardware": cpu(), "versions": versions(), "commit": commit(), "pairs": args.pairs,
                    "processes": args.processes, "load": os.getloadavg()[0], "rows": results}  # fmt: skip
        write(args.json, document)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
