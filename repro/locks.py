"""Who holds a lock file, by the word of the system: its table of locks, and the files that processes have open.

A lock of the kernel (flock, fcntl) ends with its holder. One that is no more than a file made with O_EXCL, as
torch's FileBaton, outlives it; its maker keeps the file open as long as it lives, and that is what tells.

What cannot be seen from here: processes of other hosts and other process namespaces that share the file, and those
whose open files this user may not read. Where they may exist the holder is unknown, never nobody.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

NOBODY, UNKNOWN = 0, -1

_SHARED = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "9p", "fuse", "afs", "gfs", "ocfs")
"""How the names of file systems begin whose files may be locked from another host."""


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
    for pid in _in_kernel_table(wanted):
        return pid
    unseen = False
    for process in psutil.process_iter():
        if process.pid in waiting:
            continue
        try:
            if _has_open(process.pid, wanted, os.path.basename(path)):
                return process.pid
        except PermissionError:
            unseen |= _may_be_maker(process, wanted.st_uid)
        except OSError:
            continue
    return UNKNOWN if unseen or _on_shared_file_system(path) else NOBODY


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


def _may_be_maker(process: psutil.Process, owner: int) -> bool:
    """A file belongs to the user who made it. The first process of a container often hides its files and locks none."""
    try:
        return process.pid != 1 and bool(process.uids().effective == owner)
    except psutil.Error:
        return False


def _on_shared_file_system(path: str | Path) -> bool:
    real = os.path.realpath(path)
    mounts = [part for part in psutil.disk_partitions(all=True) if _is_below(real, part.mountpoint)]
    deepest = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return deepest is not None and deepest.fstype.startswith(_SHARED)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
