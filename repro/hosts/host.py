"""Access to this host: its clock, its processes and locks, and the evidence that its ranks write on request.

The watcher and the agents reach the operating system only through :class:`Host`, so that a test can replace it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping

import psutil

from repro.hosts import collect, locks, processes
from repro.store.run_dir import RunDir
from repro.trace.identity import myself
from repro.trace.witness.format import Identity
from repro.trace.witness.parse import WitnessError

READ_FAILURES = (OSError, WitnessError, psutil.Error)
"""Errors of a read that may succeed the next time."""


class Host:
    """The host that this process runs on.

    A method raises OSError or psutil.Error if the operating system does not answer. Such an error is not evidence that
    a process has ended.
    """

    def __init__(self) -> None:
        self.here = myself(0, 1)

    def now_ns(self) -> int:
        """Return the monotonic clock, in nanoseconds."""
        return time.monotonic_ns()

    def sleep(self, duration_s: float) -> None:
        """Sleep for at least ``duration_s`` seconds."""
        time.sleep(duration_s)

    def find(self, writer: Identity) -> psutil.Process | None:
        """Find the process that writes a witness; None if the process has ended, or has not opened the witness.

        Raises psutil.AccessDenied if this user is not allowed to see the process.

        writer: the header of the witness, which has the pid and start time of the process
        """
        return processes.find(writer)

    def is_stopped(self, process: psutil.Process) -> bool:
        """Whether a signal such as SIGSTOP, or a debugger, has suspended the process."""
        return processes.is_stopped(process)

    def cpu_seconds(self, pids: Iterable[int]) -> dict[int, float]:
        """Return a dict from pid to the processor seconds that the process and its descendants have used so far."""
        return processes.cpu_seconds(pids)

    def starved_seconds(self, pid: int) -> float:
        """Return for how many seconds threads of a process have waited for a processor, summed over its threads."""
        return processes.starved_seconds(pid)

    def stolen_seconds(self) -> float:
        """Return the steal time since boot: seconds given to other guests of the hypervisor, per processor."""
        return float(getattr(psutil.cpu_times(), "steal", 0.0)) / (psutil.cpu_count() or 1)

    def lock_holder(self, name: str, waiting: Collection[int]) -> int:
        """Return the pid of the process that holds a lock file.

        Return locks.NOBODY if no process holds the lock, and locks.UNKNOWN if this cannot be found out.

        name      path of the lock file
        waiting   pids of processes that wait for the lock; they do not count as holders
        """
        return locks.holder(name, [*waiting, os.getpid()])

    def with_ancestors(self, pid: int) -> list[int]:
        """Return the pid and the pids of its ancestors, nearest first."""
        return processes.with_ancestors(pid)

    def describe(self, pid: int) -> str:
        """Return a sentence about a process, with its command and its age; "process 77 has ended" if it has ended."""
        return processes.describe(pid)

    def collect(self, run_dir: RunDir, pids: Mapping[int, int]) -> dict[int, str]:
        """Make ranks write their stacks and Flight Recorder dumps. pids: the pid of each rank that runs.

        Returns a dict from rank to the missing evidence, for each rank that did not write all of it.
        """
        return collect.collect(run_dir, pids, collect.PATIENCE_S)
