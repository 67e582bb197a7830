"""Run one variant: make the run directory, start torchrun and the reference beside it, watch, and leave nothing.

Every process started here is killed by the kernel when this one ends, however it ends; a run directory, its
verdict included, is all that stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import psutil

from repro import kernel_cache, locks, lookout, process, scenarios
from repro.comparison import compare_tokens
from repro.expectation import document_of, watch_options
from repro.layout import Geometry, Identity
from repro.rundir import OutputError, RunDir, write_json
from repro.settings import RunSettings
from repro.verdict import Verdict
from repro.watch import Watch
from repro.witness import Tail, create

RELEASE_PATIENCE_S = 8.0
"""How long ranks that are done may take to exit on their own."""

FREE_BYTES = 32 << 20
"""Room that a run must find on the disk besides its witnesses: logs, stacks, dumps and the verdict."""


CANNOT_TELL = 125
"""Exit code of what cannot run on this machine."""


class CannotRunHere(RuntimeError):
    """This machine lacks what the run needs; the text says what."""


class Interrupt:
    """Turns SIGINT, SIGTERM and SIGHUP into a flag, so that evidence can be written before anything ends."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return self.number != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number

    @contextlib.contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """Handle the signals for the length of a ``with``."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Job(Protocol):
    """What was started for a run; a Popen is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """None while it runs."""

    def wait(self) -> int:
        """Return when it has ended."""


Start = Callable[[RunDir, RunSettings], Job]


@dataclass
class Display:
    """Where a run tells how it goes: ``show`` at every poll, ``notice`` for what is worth a line."""

    show: Callable[[list[Tail]], None] = lambda tails: None
    notice: Callable[[str], None] = lambda text: None


def prepare_run_dir(out: Path, settings: RunSettings, interrupt: Callable[[], bool] = lambda: False) -> RunDir:
    """Make the run directory with its configuration and every rank's witness, all blocks allocated.

    Raises OutputError, and leaves nothing, when there is no room.
    """
    run_dir = RunDir.create(out, settings.scenario, settings.variant, settings.seed)
    try:
        if shutil.disk_usage(run_dir.root).free < FREE_BYTES:
            raise OSError(None, "no space left on device")
        write_json(run_dir.config, settings.to_mapping())
        kernel_cache.fill(run_dir, settings, interrupt)
        scenarios.load(settings.scenario).before(settings, kernel_cache.folder(run_dir, settings))
        shape = Geometry(ring_records=settings.ring_records)
        for rank in range(settings.num_ranks):
            create(run_dir.witness(rank), Identity(rank, settings.num_ranks, run_id=run_dir.root.name), shape)
        run_dir.point_latest()
    except BaseException as error:
        shutil.rmtree(run_dir.root, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    return run_dir


def run(
    settings: RunSettings,
    out: Path,
    interrupt: Callable[[], bool],
    display: Display,
    start: Start,
    known_reference: Path | None = None,
) -> tuple[RunDir, dict[str, Any]]:
    """Run one variant to its verdict; returns where it is and what verdict.json says.

    start: starts the ranks, as :func:`launcher` gives it
    known_reference: reference.json of an earlier run with the same ``reference_key``
    """
    run_dir = prepare_run_dir(out, settings, interrupt)
    if known_reference is not None and known_reference.exists():
        shutil.copyfile(known_reference, run_dir.reference)
    job = start(run_dir, settings)
    return run_dir, attend(run_dir, settings, interrupt, display, lambda: job.poll() is None, [job])


def skipped(settings: RunSettings, why: str) -> dict[str, Any]:
    """Stands in a list of verdicts for a run that this machine cannot do."""
    verdict = Verdict("inconclusive", evidence=(why,), confidence="undecided")
    no_time = {"stall_to_verdict": 0.0, "total": 0.0}
    return {**document_of(settings, verdict), "matches_expected": False, "skipped": why, "seconds": no_time}


def attend(
    run_dir: RunDir,
    settings: RunSettings,
    interrupt: Callable[[], bool],
    display: Display,
    job_alive: Callable[[], bool],
    started: Sequence[Job] = (),
) -> dict[str, Any]:
    """Watch a run that was started, to its verdict and its end; returns what verdict.json says.

    Raises OutputError when another process does so already: only one may end a run. Any other OSError, of a disk that
    fills up for one, says where the run is.
    """
    try:
        with _only_one(run_dir):
            return _attend(run_dir, settings, interrupt, display, job_alive, list(started))
    except OutputError:
        raise
    except OSError as error:
        told = f"{error.strerror or error}; what is kept of the run is in {run_dir.root}"
        raise OSError(error.errno, told, error.filename) from error


@contextlib.contextmanager
def _only_one(run_dir: RunDir) -> Iterator[None]:
    """A lock on config.json, which the kernel lets go of however its holder ends."""
    with run_dir.config.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = locks.holder(run_dir.config.resolve())
            raise OutputError(
                f"{run_dir.root}: process {pid} watches this run to its end; without --end it is judged as it is now"
            ) from None
        yield


def _attend(
    run_dir: RunDir,
    settings: RunSettings,
    interrupt: Callable[[], bool],
    display: Display,
    job_alive: Callable[[], bool],
    children: list[Job],
) -> dict[str, Any]:
    started_here = bool(children)
    reference = None
    if not run_dir.reference.exists():
        reference = _start([sys.executable, "-m", "repro.reference", str(run_dir.root)], run_dir, run_dir.reference_log)
        children.append(reference)

    def reference_alive() -> bool:
        return reference is not None and reference.poll() is None

    watch = Watch(
        run_dir,
        watch_options(settings),
        job_alive=job_alive,
        compare=lambda final: compare_tokens(run_dir, settings.num_ranks, settings.tp_size, reference_alive, final),
        describe=lambda verdict: document_of(settings, verdict),
        interrupted=interrupt,
        show=display.show,
        notice=display.notice,
    )
    try:
        document = watch.run()
        # Their work is on the disk, and to leave takes eight interpreters seconds: ours are ended, unless a library
        # has something of the host's to give back. Of another's job the launcher wants to see its ranks exit well.
        if watch.all_done() and not (started_here and settings.backend == "gloo"):
            _release(run_dir, lambda: job_alive() or watch.others_run())
    finally:
        end(run_dir, children, watch.processes())
    return document


def end(run_dir: RunDir, started: list[Job], ranks: list[psutil.Process]) -> None:
    """Kill what was started and the ranks that run, and remove what only the processes needed."""
    running = [child for child in started if child.poll() is None]  # the pid of another may be somebody else's by now
    doomed = [*ranks, *(found for child in running for found in process.with_descendants(child.pid))]
    process.kill(doomed)
    for child in started:
        child.wait()
    lookout.tidy(run_dir, (run_dir.store, run_dir.root / "rendezvous"))
    shutil.rmtree(run_dir.root / "tmp", ignore_errors=True)


@contextlib.contextmanager
def launcher(name: str) -> Iterator[Start]:
    """How the ranks of one run after another are started: one of LAUNCHERS."""
    if name == "torchrun":
        yield _start_torchrun
        return
    nursery = Nursery()
    try:
        yield nursery.start
    finally:
        nursery.close()


LAUNCHERS = ("torchrun", "fork")
"""As a server's, by torchrun, or forked from one process, which is quicker."""


def _start_torchrun(run_dir: RunDir, settings: RunSettings) -> Job:
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1", f"--nproc-per-node={settings.num_ranks}", "--max-restarts=0", "--monitor-interval=0.1",
        # The agents of one host meet through a file: no port is opened, so two runs cannot collide.
        "--rdzv-backend=c10d", f"--rdzv-endpoint={run_dir.root / 'rendezvous'}", "--rdzv-conf=store_type=file",
        "--local-addr=127.0.0.1",
        "-m", "repro.worker", settings.scenario, "--variant", settings.variant,
    ]  # fmt: skip
    return _start(command, run_dir)


class Nursery:
    """A process that has imported torch and forks a job for each run: the import is paid for once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, run_dir: RunDir, settings: RunSettings) -> Job:
        """Start the ranks of a run."""
        if self._process is None or self._process.poll() is not None:
            self._process = _start([sys.executable, "-m", "repro.forked"], run_dir, talks=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        wanted = {"run_dir": str(run_dir.root), "environment": _environment(run_dir)}
        with contextlib.suppress(BrokenPipeError):  # what ended it is in the log, and the run is judged without ranks
            self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._process.stdin.flush()
        answers, _, _ = select.select([self._process.stdout], [], [], settings.deadline_s)  # the import may be stuck
        pid = self._process.stdout.readline() if answers else b""
        if not pid:
            self.close()
        return Forked(int(pid)) if pid else self._process

    def close(self) -> None:
        """End it, and whatever it still has."""
        if self._process is not None:
            process.kill(process.with_descendants(self._process.pid))
            self._process.wait()


class Forked:
    """A process that another one forked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ticks = process.start_ticks(pid)

    def poll(self) -> int | None:
        """None while it runs."""
        return None if process.running(self.pid, self._ticks) else 0

    def wait(self) -> int:
        """Return when it has ended."""
        while self.poll() is None:
            time.sleep(0.01)
        return 0


def _start(
    command: list[str], run_dir: RunDir, log: Path | None = None, *, talks: bool = False
) -> subprocess.Popen[bytes]:
    """log: the launcher's, unless named. talks: through pipes at its standard input and output, and only its errors
    go to the log.
    """
    parent = os.getpid()
    with (log or run_dir.launcher_log).open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else output,
            stderr=output if talks else subprocess.STDOUT,
            env=_environment(run_dir),
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends the others in order
            preexec_fn=lambda: process.die_with_parent(parent),
        )


def _environment(run_dir: RunDir) -> dict[str, str]:
    temporary = run_dir.root / "tmp"
    temporary.mkdir(exist_ok=True)
    return {
        **os.environ,
        "HMR_RUN_DIR": str(run_dir.root),
        "HMR_LAUNCHER": process.name_myself(),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TMPDIR": str(temporary),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _release(run_dir: RunDir, job_alive: Callable[[], bool]) -> None:
    """Let parked ranks exit on their own."""
    run_dir.release.touch()
    deadline = time.monotonic() + RELEASE_PATIENCE_S
    while job_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    run_dir.release.unlink(missing_ok=True)
