"""Find the processes of a run, check whether they run, and end them.

Only processes that the run started are ended: descendants of its launcher, and processes whose pid and start time are
in the run's own witnesses. A later process with such a pid has a different start time, and is never ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable

import psutil

from repro.hosts.parent import die_with_parent as die_with_parent
from repro.trace.start_ticks import read_start_ticks
from repro.trace.witness.format import Identity

Process = psutil.Process
"""psutil's class for a process. Other packages use this name for it, because only hosts/ imports psutil."""

REAP_PATIENCE_S = 5.0


def running(pid: int, ticks: int) -> psutil.Process | None:
    """Find the process with this pid and start time (`parent.start_ticks`); None if it has ended or is a zombie.

    Raises psutil.AccessDenied if the process is hidden from this user. Raises OSError if the operating system does not
    answer, for example because this process has no free file descriptor. Neither error means that the process has
    ended.
    """
    try:
        process = psutil.Process(pid)
        # The pid may have been reused, so the start time is compared, too. psutil's own start time has another unit.
        return process if not _has_ended(process) and read_start_ticks(pid) == ticks else None
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        if _is_hidden(pid):
            raise psutil.AccessDenied(pid) from None
        return None


def _is_hidden(pid: int) -> bool:
    """Whether a process has this pid although /proc does not show the process, as with the mount option hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.path.exists(f"/proc/{pid}")
    except OSError:
        return False
    return False


def _has_ended(process: psutil.Process) -> bool:
    """Whether the process has ended. A zombie counts as ended."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def find(writer: Identity) -> psutil.Process | None:
    """Find the running process that writes a witness; None if it has ended, or if no process has opened the witness.

    writer: the header of the witness, which has the pid and start time of the process
    """
    return running(writer.pid, writer.pid_start_ticks) if writer.pid else None


def is_stopped(process: psutil.Process) -> bool:
    """Whether a signal such as SIGSTOP, or a debugger, has suspended the process."""
    try:
        return bool(process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.NoSuchProcess:
        return False


def with_descendants(pid: int) -> list[psutil.Process]:
    """Return the process and its descendants, parents first; [] if the process has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Iterable[psutil.Process]) -> list[int]:
    """Kill processes. Returns the pids of the processes that have not ended after REAP_PATIENCE_S seconds.

    All processes are suspended (SIGSTOP) before the first process is killed. Otherwise a rank whose peer was killed
    could write to its witness after the verdict, and the files would differ from what was judged. A zombie counts as
    ended.
    """
    left = list(processes)
    for process in left:
        with contextlib.suppress(psutil.Error, OSError):
            process.suspend()
    deadline = time.monotonic() + REAP_PATIENCE_S
    while left and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error, OSError):  # the next iteration tries again
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
    """Return the pid and the pids of its ancestors, nearest first."""
    try:
        return [pid, *(parent.pid for parent in psutil.Process(pid).parents())]
    except psutil.Error:
        return [pid]


def describe(pid: int) -> str:
    """Return a sentence about a process, with its command and its age; "process 77 has ended" if it has ended."""
    try:
        process = psutil.Process(pid)
        command = " ".join(process.cmdline()) or process.name()
        return f"process {pid} runs for {time.time() - process.create_time():.0f} s: {command[:120]}"
    except psutil.Error:
        return f"process {pid} has ended"


def cpu_seconds(pids: Iterable[int]) -> dict[int, float]:
    """Return, for each pid, the processor seconds of the process and its descendants, also of reaped descendants."""
    own: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for process in psutil.process_iter(["ppid", "cpu_times"]):
        times, parent = process.info["cpu_times"], process.info["ppid"]
        if times is not None:
            own[process.pid] = times.user + times.system + times.children_user + times.children_system
            children.setdefault(parent, []).append(process.pid)
    used: dict[int, float] = {}
    for pid in pids:
        family = [pid]
        for member in family:
            family += children.get(member, [])
        used[pid] = sum(own.get(member, 0.0) for member in family)
    return used


def starved_seconds(pid: int) -> float:
    """Return for how many seconds threads of a process have waited for a processor, summed over its threads.

    Return 0.0 if /proc does not show these times.
    """
    waited_ns = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                waited_ns += int(file.read().split()[1])
    return waited_ns / 1e9
