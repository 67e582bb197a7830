"""Start the processes of a run: its ranks, by torchrun or by a fork server, and what computes beside them."""

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
    """What was started for a run; a Popen is one."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """None while it runs."""


Start = Callable[[RunDir, RunSettings, Callable[[], bool]], Job]
"""Starts the ranks of a run; the last argument says whether the user wants an end."""


@contextlib.contextmanager
def launcher(name: str) -> Iterator[Start]:
    """What starts the ranks of one run after another: one of LAUNCHERS."""
    if name == "torchrun":
        yield _start_torchrun
        return
    server = ForkServer()
    try:
        yield server.start
    finally:
        server.close()


LAUNCHERS = ("torchrun", "fork")
"""By torchrun, as a server's ranks are, or forked from one process, which takes less time."""


def _start_torchrun(run_dir: RunDir, settings: RunSettings, interrupt: Callable[[], bool]) -> Job:
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1", f"--nproc-per-node={settings.num_ranks}", "--max-restarts=0", "--monitor-interval=0.1",
        # The agents of one host meet through a file: no port is opened, so two runs cannot collide.
        "--rdzv-backend=c10d", f"--rdzv-endpoint={run_dir.root / 'rendezvous'}", "--rdzv-conf=store_type=file",
        "--local-addr=127.0.0.1",
        "-m", "repro.worker", settings.scenario, "--variant", settings.variant,
    ]  # fmt: skip
    return start_process(command, run_dir)


class ForkServer:
    """A process that has imported torch and forks a job for each run: the import is paid for once."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, run_dir: RunDir, settings: RunSettings, interrupt: Callable[[], bool] = lambda: False) -> Job:
        """Start the ranks of a run; what is returned has ended already where that failed or was interrupted."""
        if self._process is None or self._process.poll() is not None:
            self._process = start_process([sys.executable, "-m", "repro.lab.fork_server"], run_dir, talks=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"run_dir": str(run_dir.root), "environment": _environment(run_dir)}
        with contextlib.suppress(BrokenPipeError):  # what ended it is in the log, and the run is judged without ranks
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        until = time.monotonic() + settings.deadline_s  # the import may be stuck
        answers: list[Any] = []
        while not answers and not interrupt() and time.monotonic() < until:
            answers, _, _ = select.select([self._process.stdout], [], [], POLL_S)
        if pid := self._process.stdout.readline() if answers else b"":
            return ForkedJob(int(pid))
        ended = self._process
        self.close()
        return ended

    def close(self) -> None:
        """End the process and its children, and close the pipes to it."""
        if self._process is None:
            return
        processes.kill(processes.with_descendants(self._process.pid))
        self._process.poll()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be written is of no use any more
                pipe.close()
        self._process = None


class ForkedJob:
    """A job that the fork server started; it is no child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._ticks = start_ticks(pid)

    def poll(self) -> int | None:
        """None while it runs."""
        return None if processes.running(self.pid, self._ticks) else 0


def start_process(
    command: list[str], run_dir: RunDir, log: Path | None = None, *, talks: bool = False
) -> subprocess.Popen[bytes]:
    """Start a program of a run, which ends with this process; call it in the main thread (`parent.die_with_parent`).

    log     where it prints, the launcher's log unless named
    talks   through pipes at its standard input and output, so that only its errors go to the log
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
