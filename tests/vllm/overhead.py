"""What the recorder costs a step of the real vLLM: the tiny model with DP=2, EP=2, recorded in half of the steps.

    python tests/vllm/overhead.py --vllm VENV --out DIR [--seconds 180] [--guard] [--placebo] [--one-chunk]

With --guard, what the guard costs instead. With --placebo nothing is switched, so the true difference is 0, and the
result shows the error of the method.

Of each two neighbouring steps one is recorded, inside the same worker processes and on both ranks alike. Which one is
drawn. So both sides have the same processes, memory and requests, and a load that comes and goes within a second meets
both. While the hooks are off they stay in place and return at once. A step is the time from one step agreement (C1) to
the next, and the processor time of the worker in it. The switch itself is left out. The background thread of the
recorder (or guard) runs all the time, so its processor time is printed as a share of the wall time. The hooks in the
engine and in the front end are never switched off: what they cost is not measured.

Prints the difference of the pairs in per cent of a step, with a 95 % interval (bootstrap over the steps, as the
ranks' times in one step belong together), the page faults of a step, and the load of the machine. The cost is that of
the hooks in wall time and that of the thread. Exit code: 0 if the upper end of this sum is at most 1 %, 1 if its lower
end is above, else 125.

Why page faults: CPython keeps the frames of Python functions in chunks of 16 KB. A call that needs a new chunk maps
memory, its return unmaps it, and each such pair costs one page fault and 10 to 50 us. Hooks that are on add frames, so
another call can be the one that needs a new chunk: a loop that did so in each turn may stop doing so, or begin to.
With --one-chunk all frames of a worker fit into one chunk, so that this does not count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WARM_UP = 64
"""Steps at the start that are not measured."""

STEPS_PER_LINE = 128
LIMIT = 0.01
NUM_DRAWS = 2000
WAVES = "30:450,20:450"
PLACEBO, ONE_CHUNK = "placebo", "one_chunk"
"""A file of this name in the folder HMR_OVERHEAD: switch nothing, or keep all frames of a worker in one chunk."""

LARGE_FRAME = 25_000
"""Variables of a function, 8 bytes each. CPython takes a chunk of the next power of two, of which 62 KB stay free."""

THREADS = ("repro record", "repro guard")
"""Names of the background threads of recorder and guard."""

Row = tuple[int, int, int, int, int]
"""The number of the step, whether it was recorded, its wall time and its processor time in ns, and its page faults."""


# -- in the worker: a plug-in, on with HMR_OVERHEAD=DIR ----------------------------------------------------------------


def register() -> None:
    if os.environ.get("HMR_OVERHEAD"):
        _install(Path(os.environ["HMR_OVERHEAD"]))


@functools.cache
def _install(folder: Path) -> None:
    from vllm.v1.worker import dp_utils

    dp_utils._run_ar = Switch(folder).around(dp_utils._run_ar)
    if (folder / ONE_CHUNK).exists():
        from vllm.v1.executor.multiproc_executor import WorkerProc

        WorkerProc.worker_busy_loop = in_large_frame(WorkerProc.worker_busy_loop)


def in_large_frame(function: Any) -> Any:
    """A function that calls ``function`` from a frame so large that CPython takes a new, large chunk for it."""
    variables = " = ".join(f"v{number}" for number in range(LARGE_FRAME))
    code = f"def call(*args, **options):\n    return function(*args, **options)\n    {variables} = 0\n"
    space = {"function": function}
    exec(code, space)
    return space["call"]


class Switch:
    """Switches the recorder of this process at step agreements, and keeps the times between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step = 0
        self._recording: tuple[Any, Any] | None = None
        self._guard: Any = None
        self._rows: list[Row] = []
        self._before: tuple[int, int, int] | None = None
        self._thread_before = (0, 0)
        self._placebo = (folder / PLACEBO).exists()

    def around(self, original: Any) -> Any:
        def _run_ar(*args: Any, **options: Any) -> Any:
            self._note()
            return original(*args, **options)

        return _run_ar

    def _note(self) -> None:
        now = _clocks()
        step = self._step - 1  # the one that ends here
        if self._before is not None and step >= WARM_UP:
            wall_ns, cpu_ns, faults = (after - before for after, before in zip(now, self._before, strict=True))
            self._rows.append((step, int(is_recorded(step)), wall_ns, cpu_ns, faults))
        if self._step % STEPS_PER_LINE == 0:
            self._write()
        if not self._placebo:
            self._switch(is_recorded(self._step))
        self._step += 1
        self._before = _clocks()

    def _switch(self, on: bool) -> None:
        if os.environ.get("HMR_GUARD"):
            self._switch_guard(on)
            return
        from repro.attach.record import attendant
        from repro.attach.record import rank as this
        from repro.attach.vllm import worker

        if self._recording is None:
            assert worker.current is not None and this.current is not None, "HMR_RECORD is not set"
            self._recording = worker.current, this.current
            attendant.this = SimpleNamespace(current=this.current)  # else the background thread ends at a switch
        worker.current, rank = self._recording if on else (None, None)
        this.use(rank)

    def _switch_guard(self, on: bool) -> None:
        """The ranks switch at the same agreement, so its tensor has the same shape on all of them."""
        from repro.attach.vllm.guard import worker
        from repro.attach.vllm.guard.meeting.board import Field

        if self._guard is None:
            assert worker.current is not None, "the ranks are not guarded"
            self._guard = worker.current
        worker.current = self._guard if on else None
        if on and self._guard._board is not None:  # executions that it did not see
            self._guard._num_executions = self._guard._board[Field.REQUESTED]

    def _write(self) -> None:
        threads = [at.ident for at in threading.enumerate() if at.name in THREADS and at.ident]
        cpu_ns = sum(time.clock_gettime_ns(time.pthread_getcpuclockid(ident)) for ident in threads)
        now = cpu_ns, time.perf_counter_ns()
        line = {"rows": self._rows, "thread": [now[0] - self._thread_before[0], now[1] - self._thread_before[1]]}
        if self._rows:
            with (self._folder / f"steps{os.getpid()}.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._thread_before = now
        self._rows = []


def _clocks() -> tuple[int, int, int]:
    """The wall clock and the processor time of this process in ns, and its page faults without a disk."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return time.perf_counter_ns(), time.process_time_ns(), faults


def is_recorded(step: int) -> bool:
    """Whether a step is recorded. Of two steps one is, which one is drawn: all ranks draw alike."""
    first = random.Random(step // 2).random() < 0.5
    return first == (step % 2 == 0)


# -- outside -----------------------------------------------------------------------------------------------------------


def pairs_of(ranks: list[list[Row]], column: int) -> list[float]:
    """The relative differences of pairs of neighbouring steps: (recorded - not) / the mean of both.

    The divisor is symmetric, because the mean of quotients of two noisy times is above 1. Only steps that all ranks
    have are compared; a step's time is the mean over the ranks.
    """
    times = [{row[0]: row[column] for row in rows} for rows in ranks]
    steps = set(times[0]).intersection(*times)
    pairs = []
    for step in sorted(steps):
        if step % 2 == 0 and step + 1 in steps:
            on, off = (step, step + 1) if is_recorded(step) else (step + 1, step)
            difference, total = (sum(sign * at[off] + at[on] for at in times) for sign in (-1, 1))
            pairs.append(2 * difference / total)
    return pairs


def interval(pairs: list[float]) -> tuple[float, float, float]:
    """The 10 % trimmed mean of the pairs, and its 95 % interval by bootstrap."""
    draw = random.Random(0)
    means = sorted(trimmed(draw.choices(pairs, k=len(pairs))) for _ in range(NUM_DRAWS))
    return trimmed(pairs), means[int(NUM_DRAWS * 0.025)], means[int(NUM_DRAWS * 0.975)]


def trimmed(values: list[float]) -> float:
    cut = len(values) // 10
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def main() -> int:
    from server import command, environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--guard", action="store_true", help="measure the guard, not the recorder")
    parser.add_argument("--placebo", action="store_true", help="switch nothing: the difference is the method's error")
    parser.add_argument("--one-chunk", action="store_true", help="keep all Python frames of a worker in one chunk")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True)
    for name, chosen in ((PLACEBO, args.placebo), (ONE_CHUNK, args.one_chunk)):
        if chosen:
            (out / name).touch()
    load = [Path("/proc/loadavg").read_text().split()[0]]
    serve = [*command(args.vllm.absolute(), out / "serve", WAVES, args.seconds + 600), "--seconds", str(args.seconds)]
    measured = {"HMR_GUARD": "agree"} if args.guard else {"HMR_RECORD": str(out / "record")}
    variables = {**measured, "HMR_OVERHEAD": str(out)}
    done = subprocess.run(serve, env=environment(out / "entry_points", **variables), capture_output=True)
    load.append(Path("/proc/loadavg").read_text().split()[0])
    files = sorted(out.glob("steps*.jsonl"))
    if done.returncode or not files:
        print(f"serve.py ended with {done.returncode}; see {out / 'serve'}")
        return 1
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    ranks = [[tuple(row) for line in of_rank for row in line["rows"]] for of_rank in lines]
    threads = [line["thread"] for of_rank in lines for line in of_rank]
    thread = sum(cpu for cpu, _ in threads) / sum(wall for _, wall in threads)
    code = 0
    for column, name in ((2, "wall time"), (3, "processor time of a worker")):
        pairs = pairs_of(ranks, column)
        mean, low, high = interval(pairs)
        off = [row[column] for rows in ranks for row in rows if not row[1]]
        print(
            f"{name} of a step: {100 * mean:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}] of "
            f"{statistics.median(off) / 1e6:.2f} ms (median), {len(pairs)} pairs of steps"
        )
        if column == 2:
            code = 0 if high + thread <= LIMIT else 1 if low + thread > LIMIT else 125
    means = [statistics.fmean(row[4] for rows in ranks for row in rows if row[1] == on) for on in (1, 0)]
    print(f"page faults of a step: {means[0]:.1f} with, {means[1]:.1f} without (mean)")
    print(f"background thread: {100 * thread:.2f} % of a processor")
    print(f"load before and after, on {os.cpu_count()} processors: {', '.join(load)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
