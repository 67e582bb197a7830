"""Find out which processes of the other ranks have ended.

A process on this host is watched by a pidfd, so a slow or suspended process never counts as ended. A process on another
host is watched by its heartbeat, a number in torch's store: each process changes its own number twice a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from repro.attach.vllm.guard.ending.stop import EXIT_CODE

SILENT_S = 15.0
"""A host counts as down if no process on it has changed its heartbeat for this many seconds."""


@dataclass(frozen=True)
class Process:
    """One process of the vLLM server.

    name   a unique name: "worker of rank 1"
    rank   the rank of a worker; for an engine or a front end, the rank of the engine's first worker
    ticks  start time of the process in clock ticks since boot
    host   identifies the host, see :func:`host`
    """

    name: str
    rank: int
    pid: int
    ticks: int
    host: str

    @classmethod
    def this(cls, name: str, rank: int) -> Process:
        return cls.of(name, rank, os.getpid())

    @classmethod
    def of(cls, name: str, rank: int, pid: int) -> Process:
        return cls(name, rank, pid, start_ticks(pid), host())

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Process:
        return cls(**json.loads(text))


class Peers:
    """Watches the other processes of the server, to find out which have ended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._here = host()
        self._open: dict[Process, int] = {}  # process of this host -> pidfd
        # process of another host -> (its last number, when this process first saw that number)
        self._far: dict[Process, tuple[str, float]] = {}
        self.known: dict[str, Process] = {}

    def add(self, process: Process) -> None:
        self.known[process.name] = process
        if process.host != self._here:
            self._far[process] = ("", self._clock())
            return
        try:
            descriptor = os.pidfd_open(process.pid)
        except OSError:  # the process has ended, or the system has no pidfds
            descriptor = -1
        if descriptor >= 0 and start_ticks(process.pid) not in (process.ticks, 0):  # the id belongs to another process
            os.close(descriptor)
            descriptor = -1
        self._open[process] = descriptor

    def forget(self, name: str) -> None:
        """Stop watching a process that ends normally."""
        process = self.known.get(name)
        if process is None:
            return
        self._far.pop(process, None)
        descriptor = self._open.pop(process, -1)
        if descriptor >= 0:
            os.close(descriptor)

    def watches(self, process: Process) -> bool:
        return process in self._open or process in self._far

    def ended(self) -> list[Process]:
        """Return the watched processes of this host that have ended."""
        return [process for process, descriptor in self._open.items() if _has_ended(process, descriptor)]

    def far(self) -> list[str]:
        return [process.name for process in self._far]

    def beat(self, name: str, number: str) -> None:
        """Note the heartbeat of a process on another host. If it differs from the last one, the process is alive.

        name: the name of the process; number: its heartbeat in torch's store, which it changes twice a second
        """
        process = self.known[name]
        if process in self._far and self._far[process][0] != number:
            self._far[process] = number, self._clock()

    def silent(self) -> tuple[Process, float] | None:
        """Find another host that is down. Returns a process of that host, and for how many seconds that host is silent.

        A host counts as down if no process on it has changed its heartbeat for SILENT_S seconds. Returns None if no
        host is down.
        """
        last: dict[str, float] = {}
        for process, (_, since) in self._far.items():
            last[process.host] = max(since, last.get(process.host, 0.0))
        for process in self._far:
            silent_s = self._clock() - last[process.host]
            if silent_s > SILENT_S:
                return process, silent_s
        return None

    def close(self) -> None:
        for name in list(self.known):
            self.forget(name)


def gone(process: Process, code: int | None = None) -> str:
    """Return the sentence about a process that has ended.

    code: the exit code of the process, -9 for SIGKILL; None if the code is not known
    """
    how = "has ended"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = f"was ended by {signal.Signals(-code).name}"
    elif code == EXIT_CODE:
        how = "was ended by the guard, whose line in the log of this process says why"
    elif code is not None:
        how = f"has ended with exit code {code}"
    return f"rank {process.rank} is gone: its {process.name.partition(' of ')[0]} (pid {process.pid}) {how}"


def silence(process: Process, silent_s: float) -> str:
    """Return the sentence about a host that has been silent for ``silent_s`` seconds.

    process: a process on that host; the sentence names its rank and pid
    """
    return (
        f"rank {process.rank} is gone: no process on its host has been heard of for {silent_s:.0f} s; its "
        f"{process.name.partition(' of ')[0]} had pid {process.pid}"
    )


def _has_ended(process: Process, descriptor: int) -> bool:
    if descriptor < 0:
        return start_ticks(process.pid) != process.ticks
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def start_ticks(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def host() -> str:
    """Return an identifier that is equal for two processes that can see each other's process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
