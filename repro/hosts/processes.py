"""Processes that a run started: find them, see whether they run, and end them.

Only processes are ended that this run started: descendants of its launcher, and pids that its own witnesses
name, with the start time they name, so that a pid used again is never hit.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

import psutil

from repro.hosts.parent import die_with_parent as die_with_parent
from repro.hosts.parent import read_start_ticks
from repro.trace.format import Identity

REAP_PATIENCE_S = 5.0


def running(pid: int, ticks: int) -> psutil.Process | None:
    """The process of that pid that began at those `parent.start_ticks`; None when it has ended, or is a zombie.

    Raises psutil.AccessDenied if the process is hidden from this user, and OSError if the system does not answer, as
    when this process has no file descriptor left: neither says that it has ended.
    """
    try:
        process = psutil.Process(pid)
        # A pid alone may be another process's by now. psutil's own start time is in another unit.
        return process if not _has_ended(process) and read_start_ticks(pid) == ticks else None
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        if _is_hidden(pid):
            raise psutil.AccessDenied(pid) from None
        return None


def _is_hidden(pid: int) -> bool:
    """Whether the pid is in use although /proc does not show it, as when it is mounted with hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.path.exists(f"/proc/{pid}")
    except OSError:
        return False
    return False


def _has_ended(process: psutil.Process) -> bool:
    """Whether nothing of it runs any more; it may be waiting for its parent to notice."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def find(writer: Identity) -> psutil.Process | None:
    """The running process that wrote a witness; None when it has not begun, has ended, or is a zombie."""
    return running(writer.pid, writer.pid_start_ticks) if writer.pid else None


def is_stopped(process: psutil.Process) -> bool:
    """Whether a signal or a debugger has stopped it."""
    try:
        return bool(process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.NoSuchProcess:
        return False


def with_descendants(pid: int) -> list[psutil.Process]:
    """The process and all that it started, parents first; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> list[int]:
    """SIGKILL processes and wait until they have ended or REAP_PATIENCE_S passed; returns the pids of those that have
    not. Their parents reap them, which of an orphan is the system's first process and may take seconds.

    All are stopped before the first is killed: a rank that sees a peer's connection close would write into its witness
    after the verdict, and the files would no longer say what was judged.
    """
    left = list(processes)
    for process in left:
        with contextlib.suppress(psutil.Error, OSError):
            process.suspend()
    deadline = time.monotonic() + REAP_PATIENCE_S
    while left and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error, OSError):  # the next round tries again
                process.kill()
        left = [process for process in left if not _seen_to_end(process)]
        time.sleep(0.01 if left else 0)
    return sorted({process.pid for process in left})


def _seen_to_end(process: psutil.Process) -> bool:
    try:
        return _has_ended(process)
    except (psutil.Error, OSError):
        return False


def with_ancestors(pid: int) -> list[int]:
    """The pid and those of the processes that it comes from, nearest first."""
    try:
        return [pid, *(parent.pid for parent in psutil.Process(pid).parents())]
    except psutil.Error:
        return [pid]


def describe(pid: int) -> str:
    """What a process is and since when, for people."""
    try:
        found = psutil.Process(pid)
        command = " ".join(found.cmdline()) or found.name()
        return f"process {pid} runs for {time.time() - found.create_time():.0f} s: {command[:120]}"
    except psutil.Error:
        return f"process {pid} is gone"


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """Processor time of each process and of all that it started, those included that have ended and were waited for."""
    own: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for found in psutil.process_iter(["ppid", "cpu_times"]):
        times, parent = found.info["cpu_times"], found.info["ppid"]
        if times is not None:
            own[found.pid] = times.user + times.system + times.children_user + times.children_system
            children.setdefault(parent, []).append(found.pid)
    used: dict[int, float] = {}
    for pid in pids:
        family = [pid]
        for member in family:
            family += children.get(member, [])
        used[pid] = sum(own.get(member, 0.0) for member in family)
    return used


def starved_seconds(pid: int) -> float:
    """How long the threads of a process were ready to run and had no processor; 0.0 where the kernel does not say."""
    waited_ns = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                waited_ns += int(file.read().split()[1])
    return waited_ns / 1e9
