"""The bond between a process and the one that started it: the child ends when its parent does, however that ends.

Imports almost nothing: a rank calls it before its long imports, during which its launcher may be killed.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)  # loaded here, as little is safe to do between fork and exec


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the *thread* that started it ends: start children from the main thread.

    parent: pid of the process that started this one, where known; if it is gone already this one ends at once
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def start_ticks(pid: int) -> int:
    """When a process began, in clock ticks since boot; 0 where that cannot be read."""
    try:
        return read_start_ticks(pid)
    except (OSError, ValueError, IndexError):
        return 0


def read_start_ticks(pid: int) -> int:
    """As :func:`start_ticks`; raises OSError where that cannot be read, ValueError or IndexError for nonsense."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def name_myself() -> str:
    """This process as "pid:start ticks", for a child that will ask whether it still runs."""
    return f"{os.getpid()}:{start_ticks(os.getpid())}"


def end_without_launcher() -> None:
    """End at once if HMR_LAUNCHER names a process that is gone: it was killed before its death could reach this one."""
    pid, _, ticks = os.environ.get("HMR_LAUNCHER", "").partition(":")
    if pid.isdecimal() and ticks.isdecimal() and len(pid) < 12 and start_ticks(int(pid)) != int(ticks[:30]):
        os._exit(1)
