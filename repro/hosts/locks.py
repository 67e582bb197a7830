"""Who holds a lock file, by the word of the system: its table of locks, and the files that processes have open.

A lock of the kernel (flock, fcntl) ends with its holder. One that is no more than a file made with O_EXCL, as
torch's FileBaton, outlives it; its maker keeps the file open as long as it lives, and that is what tells.

Processes of other process namespaces, and those whose open files this user may not read, are not seen from here, but
the kernel knows whether any has the file open. Processes of other hosts that share the file system it does not know:
there, and where it will not say, the holder is unknown, never nobody.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from hybrid_moe_ref.open_files import who_has_open

NOBODY, UNKNOWN = 0, -1
LOOKS = 3


def holder(path: str | Path, waiting: Collection[int] = ()) -> int:
    """The pid of the process of this host that holds the lock file; NOBODY or UNKNOWN.

    waiting: pids that are known to wait for it, and may have the file open for that
    """
    if not os.path.isabs(path):
        return UNKNOWN  # a name of something else
    try:
        wanted = os.stat(path)
    except OSError:
        return UNKNOWN  # not there: whoever waits for it is about to see that
    if not stat.S_ISREG(wanted.st_mode):
        return UNKNOWN  # nothing to open: a pipe would be waited for without end
    for pid in _in_kernel_table(wanted):
        return pid
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look at
            if pid not in waiting and _has_open(pid, wanted, os.path.basename(path)):
                return pid
    # Nobody is seen, which proves little where processes may hide; that nobody has it open is for the kernel to say.
    # One that waits for the file may have looked into it just now.
    unopened = any(who_has_open(Path(path)) == 0 for _ in range(LOOKS))
    return NOBODY if unopened and os.path.exists(path) else UNKNOWN


def _in_kernel_table(wanted: os.stat_result) -> Iterator[int]:
    """Holders of the file in /proc/locks, UNKNOWN for one that is not of this process namespace."""
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return
    place = f"{os.major(wanted.st_dev):02x}:{os.minor(wanted.st_dev):02x}:{wanted.st_ino}"
    for line in lines:
        # "1: FLOCK  ADVISORY  WRITE 4242 00:2f:1234 0 EOF"; a waiter's line has "->" after its number
        fields = line.split()
        if len(fields) >= 6 and fields[1] != "->" and fields[5] == place:
            pid = int(fields[4])
            yield pid if pid > 0 else UNKNOWN


def _has_open(pid: int, wanted: os.stat_result, name: str) -> bool:
    """The file may be mounted elsewhere for that process, so that its path is no proof; its name is a quick no."""
    folder = f"/proc/{pid}/fd"
    for descriptor in os.listdir(folder):
        try:
            if os.path.basename(os.readlink(f"{folder}/{descriptor}")) != name:
                continue
            found = os.stat(f"{folder}/{descriptor}")
        except FileNotFoundError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False
