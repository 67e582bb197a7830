"""Start the processes of a run: the ranks, by torchrun or by a fork server, and the single-process reference."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from repro.hosts import processes
from repro.hosts.parent import die_with_parent, name_myself, start_ticks
from repro.lab.settings import RunSettings
from repro.store.run_dir import RunDir

POLL_S = 0.05


class Job(Protocol):
    """A process that was started for a run, such as a ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""


Start = Callable[[RunDir, RunSettings, Callable[[], bool]], Job]
"""A function that starts the ranks of a run. Its last argument returns whether the user has interrupted."""


@contextlib.contextmanager
def launcher(name: str) -> Iterator[Start]:
    """Yield a function that starts the ranks of a run. ``name`` says how: "torchrun", or "fork" (by a fork server).

    The fork server, if there is one, ends with the ``with`` block.
    """
    if name == "torchrun":
        yield _start_torchrun
        return
    server = ForkServer()
    try:
        yield server.start
    finally:
        server.close()


LAUNCHERS = ("torchrun", "fork")
""""torchrun" starts the ranks in the way of a real server. "fork" is faster: it forks them from one process."""


def _start_torchrun(run_dir: RunDir, settings: RunSettings, interrupt: Callable[[], bool]) -> Job:
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1", f"--nproc-per-node={settings.num_ranks}", "--max-restarts=0", "--monitor-interval=0.1",
        # torchrun's ranks meet through a file. This opens no port, so two runs cannot collide.
        "--rdzv-backend=c10d", f"--rdzv-endpoint={run_dir.root / 'rendezvous'}", "--rdzv-conf=store_type=file",
        "--local-addr=127.0.0.1",
        "-m", "repro.worker", settings.scenario, "--variant", settings.variant,
    ]  # fmt: skip
    return start_process(command, run_dir)


class ForkServer:
    """A process that has imported torch, and forks the parent process of the ranks (the job) for each run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, run_dir: RunDir, settings: RunSettings, interrupt: Callable[[], bool] = lambda: False) -> Job:
        """Start the ranks of a run. Returns a process that runs as long as they do, or has ended if the start failed.

        interrupt: returns whether the user has interrupted; then the start fails
        """
        if self._process is None or self._process.poll() is not None:
            self._process = start_process([sys.executable, "-m", "repro.lab.start.fork_server"], run_dir, talks=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"run_dir": str(run_dir.root), "environment": _environment(run_dir)}
        with contextlib.suppress(BrokenPipeError):  # the server died: its log says why, and the run gets a verdict
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        until = time.monotonic() + settings.deadline_s  # the server's import of torch may hang
        answers: list[Any] = []
        while not answers and not interrupt() and time.monotonic() < until:
            answers, _, _ = select.select([self._process.stdout], [], [], POLL_S)
        if pid := self._process.stdout.readline() if answers else b"":
            return ForkedJob(int(pid))
        ended = self._process
        self.close()
        return ended

    def close(self) -> None:
        """Kill the fork server and its descendants, and close the pipes to the server."""
        if self._process is None:
            return
        processes.kill(processes.with_descendants(self._process.pid))
        self._process.poll()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # the unsent request no longer matters
                pipe.close()
        self._process = None


class ForkedJob:
    """A job (the parent process of a run's ranks) that the fork server started.

    The job is no child of this process, so `poll` looks for its pid.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ticks = start_ticks(pid)

    def poll(self) -> int | None:
        """Return 0 if the job has ended, because its exit code cannot be known; None while the job runs."""
        return None if processes.running(self.pid, self._ticks) else 0


def start_process(
    command: list[str], run_dir: RunDir, log: Path | None = None, *, talks: bool = False
) -> subprocess.Popen[bytes]:
    """Start a program of a run. Call this in the main thread: if the calling thread ends, the program is killed.

    log     the file that the program prints to; the launcher's log by default
    talks   whether this process exchanges messages with the program through pipes; then only the program's standard
            error goes to the log
    """
    parent = os.getpid()
    with (log or run_dir.launcher_log).open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if talks else output,
            stderr=output if talks else subprocess.STDOUT,
            env=_environment(run_dir),
            start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then ends the others
            preexec_fn=lambda: die_with_parent(parent),
        )


def _environment(run_dir: RunDir) -> dict[str, str]:
    temporary = run_dir.root / "tmp"
    temporary.mkdir(exist_ok=True)
    return {
        **os.environ,
        "HMR_RUN_DIR": str(run_dir.root),
        "HMR_LAUNCHER": name_myself(),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TMPDIR": str(temporary),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONUNBUFFERED": "1",
    }
