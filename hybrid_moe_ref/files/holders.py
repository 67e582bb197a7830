"""Find the process that has a file open, by a write lease and /proc/*/fd. Linux only; does not import torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from pathlib import Path

import psutil

_SHARED_KINDS = ("nfs", "cifs", "smb", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "fuse", "9p", "virtiofs")


def who_has_open(path: Path) -> int:
    """Return the pid of a process of this host that has the file open; 0 if no process has.

    Returns -1 if this cannot be determined, for example on a file system that other hosts share, or if the process
    belongs to another user.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # do not wait for the writer of a pipe
    except FileNotFoundError:
        return 0
    except OSError:
        return -1
    try:
        mine = os.fstat(descriptor)
        if _is_shared(mine.st_dev):
            return -1
        # The operating system grants a write lease only on a file that no other process of any user has open. A process
        # that opens the file in the meantime breaks the lease, and the signal about that has no effect by default.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return 0
    except OSError:
        return _pid_with_open(mine.st_dev, mine.st_ino)
    finally:
        os.close(descriptor)


def _pid_with_open(device: int, inode: int) -> int:
    """Return the pid of another process that has the file open; -1 if no process that this user can inspect has it.

    device, inode: the numbers of the file, as in `os.stat`
    """
    for pid in psutil.pids():
        if pid == os.getpid():
            continue
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    held = os.stat(f"/proc/{pid}/fd/{name}")
                    if (held.st_dev, held.st_ino) == (device, inode):
                        return pid
        except OSError:  # the process has ended, or this user may not inspect it
            continue
    return -1


def _is_shared(device: int) -> bool:
    """Whether several hosts can mount the kind of file system that `device` has. True if the mounts cannot be read.

    device: `st_dev` of a file on this file system
    """
    try:
        with open("/proc/self/mountinfo") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return True
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [fields[fields.index("-") + 1] for fields in mounts if fields[2] == number]
    return any(kind.startswith(_SHARED_KINDS) for kind in kinds)
