"""What the recorder costs a step of the real vLLM: the tiny model with DP=2, EP=2, recorded in half of the steps.

    python tests/vllm/overhead.py --vllm VENV --out DIR [--seconds 180] [--guard]

With --guard, what the guard costs instead.

The recorder is switched off and on again every 16 steps inside the same worker processes, on both ranks at the same
step, in an order that is drawn for each pair of blocks. So both sides have the same processes, memory and machine.
While it is off its hooks stay in place and return at once. A step is the time from one step agreement (C1) to the next,
and the processor time of the worker in it. The first step after a switch is left out.

Prints the difference of the pairs in per cent of a step, with a 95 % interval (bootstrap), and the load of the machine.
Exit code 0 if the upper end is at most 1 %, 1 if the lower end is above, 125 if the interval has 1 % inside.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

BLOCK = 16
"""Steps between two switches, about 0.4 s."""

WARM_UP = 64
"""Steps at the start that are not measured."""

LIMIT = 0.01
NUM_DRAWS = 2000
WAVES = "30:450,20:450"

Row = tuple[int, int, int]
"""Whether the step was recorded, its wall time and its processor time in ns."""


# -- in the worker: a plug-in, on with HMR_OVERHEAD=DIR ----------------------------------------------------------------


def register() -> None:
    if os.environ.get("HMR_OVERHEAD"):
        _install(Path(os.environ["HMR_OVERHEAD"]))


@functools.cache
def _install(folder: Path) -> None:
    from vllm.v1.worker import dp_utils

    dp_utils._run_ar = Switch(folder).around(dp_utils._run_ar)


class Switch:
    """Switches the recorder of this process at step agreements, and keeps the times between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step = 0
        self._recording: tuple[Any, Any] | None = None
        self._guard: Any = None
        self._rows: list[Row] = []
        self._before: tuple[int, int] | None = None

    def around(self, original: Any) -> Any:
        def _run_ar(*args: Any, **options: Any) -> Any:
            self._note()
            return original(*args, **options)

        return _run_ar

    def _note(self) -> None:
        now = time.perf_counter_ns(), time.process_time_ns()
        place = self._step % BLOCK
        if self._before is not None and place > 1 and self._step > WARM_UP:  # the row of the step that ends here
            recorded = int(is_recorded(self._step // BLOCK))
            self._rows.append((recorded, now[0] - self._before[0], now[1] - self._before[1]))
        if place == 0:
            self._switch(is_recorded(self._step // BLOCK))
            if self._step and self._step % (8 * BLOCK) == 0:
                self._write()
        self._step += 1
        self._before = time.perf_counter_ns(), time.process_time_ns()

    def _switch(self, on: bool) -> None:
        if os.environ.get("HMR_GUARD"):
            self._switch_guard(on)
            return
        from repro.attach.record import rank as this
        from repro.attach.record.attendant import Attendant
        from repro.attach.vllm import worker

        if self._recording is None:
            assert worker.current is not None and this.current is not None, "HMR_RECORD is not set"
            self._recording = worker.current, this.current
        worker.current, rank = self._recording if on else (None, None)
        this.use(rank)
        attended = any(thread.name == "repro record" for thread in threading.enumerate())
        if this.current is not None and not attended:
            Attendant(this.current).start()

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
        with (self._folder / f"steps{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(self._rows) + "\n")  # one line for eight blocks
        self._rows = []


def is_recorded(block: int) -> bool:
    """Whether a block is recorded. Of two blocks one is, which one is drawn: all ranks draw alike."""
    first = random.Random(block // 2).random() < 0.5
    return first == (block % 2 == 0)


# -- outside -----------------------------------------------------------------------------------------------------------


def pairs_of(rows: list[Row], column: int) -> list[float]:
    """The relative differences of pairs of neighbouring blocks: (recorded - not) / not, of the blocks' medians."""
    blocks: list[tuple[int, list[int]]] = []
    for row in rows:
        if not blocks or blocks[-1][0] != row[0] or len(blocks[-1][1]) >= BLOCK - 2:
            blocks.append((row[0], []))
        blocks[-1][1].append(row[column])
    pairs = []
    for (first, some), (second, others) in zip(blocks[::2], blocks[1::2], strict=False):
        if first == second:
            raise ValueError("two neighbouring blocks are both recorded, or both not")
        on, off = (some, others) if first else (others, some)
        pairs.append(statistics.median(on) / statistics.median(off) - 1)
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
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True)
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
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    code = 0
    for column, name in ((1, "wall time"), (2, "processor time of a worker")):
        pairs = [pair for lines in ranks for rows in lines for pair in pairs_of(rows, column)]
        off = [row[column] for lines in ranks for rows in lines for row in rows if not row[0]]
        mean, low, high = interval(pairs)
        print(
            f"{name} of a step: {100 * mean:+.2f} % [{100 * low:+.2f}, {100 * high:+.2f}] of "
            f"{statistics.median(off) / 1e6:.2f} ms (median), {len(pairs)} pairs of {BLOCK} steps"
        )
        if column == 1:
            code = 0 if high <= LIMIT else 1 if low > LIMIT else 125
    print(f"load before and after, on {os.cpu_count()} processors: {', '.join(load)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
