"""Test your expert-parallel backend for hangs: run it on real ranks, watch them from outside, and get a verdict.

    from repro.testing import assert_no_deadlock

    def exchange(rank):  # runs in each rank, which is a process of its own
        dispatcher = YourDispatcher(rank.world, rank.device)
        with assert_no_deadlock("layer 0"):
            dispatcher.dispatch(...)

    def test_it(ep_ranks):
        ep_ranks(4, "gloo").run(exchange)

Inside the ``with`` block every torch.distributed collective is recorded, and a watcher follows the ranks. If no rank
has recorded an event for the quiet window, the watcher judges the ranks. If the evidence explains why they stand still,
the test fails. If the evidence does not explain it, the watcher continues, and the test fails at the deadline unless
all ranks are done by then. The error text has the waits between the ranks, the ranks' stacks, and the path of a report.
If a rank raises an exception, the test fails with the traceback of this rank. After the test, no process of a rank is
left.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro import report
from repro.attach.block_names import blocks_compared
from repro.attach.record import rank as recorded
from repro.hosts import processes
from repro.hosts.options import ALL_GROUPS, WatchOptions
from repro.hosts.parent import start_ticks
from repro.report.page.rank_files import main_stack
from repro.store.run_dir import PARTS, RunDir, read_text
from repro.store.schema import to_json
from repro.store.text import escape_lines
from repro.trace.witness.file import create
from repro.trace.witness.format import Identity
from repro.verdict import Verdict
from repro.verdict.classes import class_of
from repro.verdict.result import name_ranks
from repro.watch.document import Document, describe
from repro.watch.live import Watch

if TYPE_CHECKING:
    import torch

    from repro.trace.recording.recorder import Recorder

POLL_S = 0.02
PARK_S = 10.0
LEAVE_S = 2.0
_NOT_THEIRS = (
    "repro/attach/record/",
    "repro/attach/harness.py",
    '"torch/',
    '"_pytest/',
    '"pluggy/',
)  # files whose frames are not the user's code


class DeadlockError(AssertionError):
    """The ranks did not finish, or finished with wrong results.

    The text of the error has the verdict, its evidence, the ranks' stacks and output, and the path of the report.
    """


@dataclass(frozen=True)
class Rank:
    """The rank in which a function of a test runs. ``Ranks.run`` passes this object to the function.

    rank      the number of the rank
    device    the rank's device: the CPU, or with the backend "nccl" the rank's own GPU
    recorder  writes the rank's witness

    The attribute ``world`` is the process group of all ranks. torch.distributed is initialised.
    """

    rank: int
    num_ranks: int
    device: torch.device
    recorder: Recorder

    @property
    def world(self) -> Any:
        import torch.distributed as dist

        return dist.group.WORLD


_current: list[recorded.Rank] = []


@contextlib.contextmanager
def assert_no_deadlock(name: str = "") -> Iterator[None]:
    """Record the collectives that this rank issues in the ``with`` block, so that a verdict can explain a hang there.

    name: the name of the block; the verdict shows it as the layer of these collectives

    Collectives outside such blocks are not recorded. If the ranks hang in a block, ``run`` raises DeadlockError, not
    the block. Use the block only in a function that ``ep_ranks(…).run`` calls: elsewhere it raises RuntimeError.
    """
    if not _current:
        raise RuntimeError("assert_no_deadlock() works only in a function that ep_ranks(n, backend).run(...) runs")
    rank = _current[0]
    rank.phase(name or "watched")
    with recorded.recorded_as(rank, name):
        yield
    rank.phase("after")


@dataclass
class Ranks:
    """The ranks of a test: processes on this host, forked from the process of the test.

    backend         "gloo" on the CPU, or "nccl" with a GPU for each rank
    root            the folder for the evidence of each run
    quiet_window_s  the ranks are judged when no rank has recorded an event for this many seconds
    deadline_s      after how many seconds a run fails, even if its ranks still record events

    Eight ranks start in about a second, because the process of the test imports torch before it forks them.
    """

    num_ranks: int
    backend: str
    root: Path
    quiet_window_s: float = 1.0
    deadline_s: float = 60.0

    def run(self, function: Callable[[Rank], Any]) -> list[Any]:
        """Call ``function(rank)`` in one process per rank. Returns the results in the order of the ranks.

        A result must be picklable. Raises DeadlockError with the verdict in these cases:

        - the ranks hang, or are not done by the deadline
        - a rank dies or raises an exception
        - all ranks are done, but their results are wrong, because different collectives were matched with each other

        Raises RuntimeError if the watcher itself fails.
        """
        import torch  # noqa: F401 - one import here instead of one in every rank

        numbers = itertools.count(1)
        run_dir = RunDir(next(root for n in numbers if not (root := self.root / f"run{n}").exists()))
        for part in PARTS:
            (run_dir.root / part).mkdir(parents=True)
        for rank in range(self.num_ranks):
            create(run_dir.witness(rank), Identity(rank, self.num_ranks, run_id=run_dir.root.name))
        pids = [self._fork(run_dir, rank, function) for rank in range(self.num_ranks)]
        children = {pid: start_ticks(pid) for pid in pids}
        patience_s = 0.0  # the run hangs: its ranks will not exit by themselves, and their evidence is collected
        try:
            self._watch(run_dir, children)
            patience_s = LEAVE_S
            return [pickle.loads(run_dir.output(rank).read_bytes()) for rank in range(self.num_ranks)]
        finally:
            started = [child for pid in pids for child in processes.with_descendants(pid)[1:]]
            run_dir.release.touch()
            _end(pids, patience_s)
            processes.kill(started)

    # -- the parent ------------------------------------------------------------------------------------------------

    def _watch(self, run_dir: RunDir, children: Mapping[int, int]) -> None:
        """Watch until all ranks are done. Raise DeadlockError if the run ends in another way.

        children: a dict from the process id of each rank to the start time of this process, in clock ticks
        """
        queued = ALL_GROUPS if self.backend == "nccl" else ()
        watch = Watch(
            run_dir,
            WatchOptions(self.num_ranks, self.quiet_window_s, self.deadline_s, queued),
            job_alive=lambda: any(processes.running(pid, ticks) for pid, ticks in children.items()),
            describe=self._describe,
            read=blocks_compared,
        )
        document = watch.run()
        if run_dir.watcher_log.exists():
            raise RuntimeError(document.evidence[0])  # a failure of the watcher, not of the code under test
        if not watch.all_done() or class_of(document.verdict).is_finished_wrong:
            raise DeadlockError(self._explain(run_dir, document))

    def _describe(self, verdict: Verdict) -> Document:
        return describe(
            verdict, scenario=self.root.name, variant="test", backend=self.backend, num_ranks=self.num_ranks
        )

    def _explain(self, run_dir: RunDir, document: Document) -> str:
        cause = f" ({document.cause})" if document.cause else ""
        lines = [f"{document.verdict}{cause} on {self.num_ranks} {self.backend} ranks"]
        if document.seconds.total >= self.deadline_s:
            lines[0] = f"not done after {self.deadline_s:g} s: {lines[0]}"
        lines += [f"  {text}" for text in (*document.sentences, *document.evidence, *differences(document))]
        lines += self._stacks(run_dir)
        for rank in range(self.num_ranks):
            if printed := read_text(run_dir.log(rank)).strip():  # "" for a rank that died before it opened its log file
                lines += [f"rank {rank} printed:", *(f"  {line}" for line in printed.splitlines()[-25:])]
        with contextlib.suppress(OSError, ValueError):
            report.write(run_dir.root, [])
            lines.append(f"report: {run_dir.root / 'report.html'}")
        return escape_lines("\n".join(lines))

    def _stacks(self, run_dir: RunDir) -> list[str]:
        together: dict[str, list[int]] = {}
        for rank in range(self.num_ranks):
            stack = main_stack(read_text(run_dir.stack(rank)))
            frames = [line for line in stack.splitlines() if not any(part in line for part in _NOT_THEIRS)]
            if frames:
                together.setdefault("\n".join(frames[:6]), []).append(rank)
        return [f"{name_ranks(ranks)}, most recent call first:\n{frames}" for frames, ranks in together.items()]

    # -- a rank ----------------------------------------------------------------------------------------------------

    def _fork(self, run_dir: RunDir, rank: int, function: Callable[[Rank], Any]) -> int:
        parent = os.getpid()
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        try:
            processes.die_with_parent(parent)
            self._run_rank(run_dir, rank, function)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(0)

    def _run_rank(self, run_dir: RunDir, rank: int, function: Callable[[Rank], Any]) -> None:
        """Run one rank in this process, then wait until the process of the test allows the ranks to exit.

        A rank that exits before the others would make their collectives fail, and so change the evidence.
        """
        from repro.hosts.signals import dump_on_signals
        from repro.trace.recording.recorder import Recorder

        log = run_dir.log(rank).open("w", buffering=1)
        sys.stdout = sys.stderr = log
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        dump_on_signals(run_dir, rank)
        faulthandler.dump_traceback_later(self.deadline_s + PARK_S, exit=True)
        recorder = Recorder.open(run_dir.witness(rank), rank, self.num_ranks)
        recorder.phase("start")
        try:
            result = function(self._connect(run_dir, rank, recorder))
            run_dir.output(rank).write_bytes(pickle.dumps(result))
            recorder.done()
        except BaseException as error:
            traceback.print_exc()
            recorder.failed(f"{type(error).__name__}: {error}")
        until = time.monotonic() + self.deadline_s + PARK_S
        while not run_dir.release.exists() and time.monotonic() < until:
            time.sleep(POLL_S)

    def _connect(self, run_dir: RunDir, rank: int, recorder: Recorder) -> Rank:
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from repro.attach.record.attendant import Attendant
        from repro.attach.record.start import install

        torch.set_num_threads(1)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        device = torch.device("cuda", rank) if self.backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            self.backend,
            store=dist.FileStore(str(run_dir.store), self.num_ranks),
            rank=rank,
            world_size=self.num_ranks,
            # longer than the deadline, so that the watcher ends the run before a timeout of the group does
            timeout=timedelta(seconds=self.deadline_s + 600),
        )
        install()
        _current[:] = [recorded.Rank(recorder, rank, run_dir.root)]
        Attendant(_current[0]).start()
        return Rank(rank, self.num_ranks, device, recorder)


_COMPARED = {
    "op": "operation", "layer": "name of the block", "sizes": "sizes", "dtype": "dtype", "reduce_op": "reduction",
    "root": "root",
}  # fmt: skip


def differences(document: Document) -> list[str]:
    """Return a sentence for each argument (sizes, dtype, …) in which the ranks' calls of one collective differ.

    The collective is the first one in which the ranks diverge.

    document: the content of verdict.json, which has the call of each rank
    """
    sides = document.sides
    lines = []
    for argument, what in _COMPARED.items():
        values = [getattr(side, argument) for side in sides]
        if None not in values and any(value != values[0] for value in values):
            each = ", ".join(
                f"{name_ranks(side.ranks)} {to_json(value)!r}" for side, value in zip(sides, values, strict=True)
            )
            lines.append(f"{sides[0].group} #{sides[0].seq} differs in {what}: {each}")
    return lines


def _end(pids: list[int], patience_s: float) -> None:
    """Wait until the processes of all ranks have ended. After ``patience_s`` seconds, kill those that still run."""
    deadline = time.monotonic() + patience_s
    left = set(pids)
    while left:
        for pid in list(left):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            left.discard(pid)
        if left and time.monotonic() > deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
