"""End a process when its parent ends, and identify a process by pid and start time.

A rank calls these functions before it imports torch: the import takes seconds, and the launcher can die in this time.
So this module itself imports almost nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal

from repro.trace.start_ticks import read_start_ticks

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded at import, because little is safe between fork and exec


def die_with_parent(parent: int | None = None) -> None:
    """Ask the operating system to kill this process when its parent ends.

    Linux kills this process as soon as the *thread* that started it ends. So start child processes from the main
    thread.

    parent: pid of the parent, if known. If this parent has already ended, this process exits at once
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def start_ticks(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if it cannot be read."""
    try:
        return read_start_ticks(pid)
    except (OSError, ValueError, IndexError):
        return 0


def name_myself() -> str:
    """Return "pid:start ticks" of this process. With this text, a child can check whether this process still runs."""
    return f"{os.getpid()}:{start_ticks(os.getpid())}"


def end_without_launcher() -> None:
    """Exit at once if the launcher, which HMR_LAUNCHER names as "pid:start ticks", has already ended."""
    pid, _, ticks = os.environ.get("HMR_LAUNCHER", "").partition(":")
    if pid.isdecimal() and ticks.isdecimal() and len(pid) < 12 and start_ticks(int(pid)) != int(ticks[:30]):
        os._exit(1)
