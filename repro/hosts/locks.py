"""Find the process that holds a lock file, from /proc/locks and /proc/*/fd.

A lock of the operating system (flock, fcntl) ends with the process that holds it. Another kind of lock, such as torch's
FileBaton, is only a file created with O_EXCL. This file remains when the holder ends. The holder keeps the file open,
so an open file shows that the holder lives.

/proc does not show processes of other pid namespaces, nor open files that this user is not allowed to see. But the
attempt to take a lease (fcntl F_SETLEASE) shows whether any process of this host has the file open. If several hosts
share the file system, the attempt does not show the processes of the other hosts, so the result is UNKNOWN instead of
NOBODY. The same holds for a file system without leases.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

from hybrid_moe_ref.files.holders import who_has_open

NOBODY, UNKNOWN = 0, -1
LOOKS = 3


def holder(path: str | Path, waiting: Collection[int] = ()) -> int:
    """Return the pid of the process of this host that holds the lock file.

    Return NOBODY if no process holds the lock, and UNKNOWN if this cannot be found out.

    waiting: pids of processes that wait for the lock. They do not count as holders, even if they have the file open
    """
    if not os.path.isabs(path):
        return UNKNOWN  # the name is not the name of a file
    try:
        status = os.stat(path)
    except OSError:
        return UNKNOWN  # the file is gone, which the waiting processes will notice soon
    if not stat.S_ISREG(status.st_mode):
        return UNKNOWN  # opening a pipe could block for ever
    for pid in _holders_in_table(status):
        return pid
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if pid not in waiting and _has_open(pid, status, os.path.basename(path)):
                return pid
    # No visible process has the file open, but a hidden process may have. In that case a lease fails. Try several
    # times, because a process that waits for the lock may have the file open for a moment.
    unopened = any(who_has_open(Path(path)) == 0 for _ in range(LOOKS))
    return NOBODY if unopened and os.path.exists(path) else UNKNOWN


def _holders_in_table(status: os.stat_result) -> Iterator[int]:
    """Yield the pid of each process that holds a lock on the file, from /proc/locks.

    Yield UNKNOWN for a process of another pid namespace. status: the result of os.stat for the lock file
    """
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        # Example: "1: FLOCK  ADVISORY  WRITE 4242 00:2f:1234 0 EOF". The line of a waiter has "->" after its number.
        fields = line.split()
        if len(fields) >= 6 and fields[1] != "->" and fields[5] == place:
            pid = int(fields[4])
            yield pid if pid > 0 else UNKNOWN


def _has_open(pid: int, status: os.stat_result, name: str) -> bool:
    """Whether a process has the file with this status (device and inode) open.

    Raises OSError if the process has ended or belongs to another user.

    name: the file's name without its folder, because the folder can differ in the process's mount namespace
    """
    folder = f"/proc/{pid}/fd"
    for descriptor in os.listdir(folder):
        try:
            if os.path.basename(os.readlink(f"{folder}/{descriptor}")) != name:
                continue
            opened = os.stat(f"{folder}/{descriptor}")
        except FileNotFoundError:
            continue
        if (opened.st_dev, opened.st_ino) == (status.st_dev, status.st_ino):
            return True
    return False
