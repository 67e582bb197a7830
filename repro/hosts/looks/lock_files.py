"""Find the lock files that processes hold and wait for, from /proc/locks and from the open files of the processes.

This code does not open, lock or lease a lock file. A lease would delay a program that opens the file at that moment.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from repro.hosts.looks.proc import PROC, open_files, read_text


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A line of /proc/locks.

    kind     the kernel's word for the lock, in lower case: "flock", "posix" or "lease"
    pid      0 if the process is in another pid namespace
    device   major and minor number of the device that has the file
    waits    True if the process waits for the lock, False if it holds the lock
    """

    kind: str
    pid: int
    device: tuple[int, int]
    inode: int
    waits: bool


@dataclass(slots=True)
class LockFile:
    """A lock file at one moment.

    kind     "flock", "fcntl" (POSIX), "lease" or "baton". A baton is a file whose existence is the lock, as with
             torch's FileBaton
    holders  pids of the processes that hold the lock; for a baton, of those that have the file open
    waiters  pids that /proc/locks shows as waiting; programs that try the lock again and again are not among them
    hidden   for a baton: number of Python processes whose open files this user is not allowed to see, so that one of
             them possibly holds the lock
    age_s    for a baton: seconds since the file was last changed; None for other locks
    """

    path: str
    kind: str
    holders: list[int] = field(default_factory=list)
    waiters: list[int] = field(default_factory=list)
    hidden: int = 0
    age_s: float | None = None


def parse_table(text: str) -> list[TableEntry]:
    """Parse /proc/locks: "1: FLOCK  ADVISORY  WRITE 4242 00:2f:1234 0 EOF"; a waiter has "->" after the number."""
    entries = []
    for line in text.splitlines():
        words = line.split()
        waits = words[1:2] == ["->"]
        if waits:
            del words[1]
        if len(words) < 6 or words[5].count(":") != 2:
            continue
        major, minor, inode = words[5].split(":")
        try:
            pid = max(int(words[4]), 0)
            entry = TableEntry(words[1].lower(), pid, (int(major, 16), int(minor, 16)), int(inode), waits)
        except ValueError:
            continue
        entries.append(entry)
    return entries


def look_at_locks(
    family: Collection[int], table: Iterable[int], named: Mapping[str, int], proc: Path = PROC
) -> list[LockFile]:
    """Return the lock files of a job.

    family  pids of the job's processes and their descendants
    table   pids of all processes of this host: each can be the holder of a baton
    named   a dict from the path of a lock file to the pid of a process whose stack names this file
    """
    try:
        entries = parse_table(read_text(proc / "locks"))
    except OSError:
        entries = []
    files: dict[int, LockFile] = {}  # inode -> lock
    opened = {pid: dict(_open_inodes(pid, proc)) for pid in family}
    concerned = {entry.inode for entry in entries if entry.pid in family}
    for entry in entries:
        if entry.inode in concerned:
            path = _path_of(entry, opened)
            lock = files.setdefault(
                entry.inode, LockFile(path, {"posix": "fcntl", "ofdlck": "fcntl"}.get(entry.kind, entry.kind))
            )
            (lock.waiters if entry.waits else lock.holders).append(entry.pid)
    hidden = -1
    for path, pid in {**_lock_names(opened), **named}.items():
        status = _status(path, pid, proc)
        if status is None or status.st_ino in files:
            continue
        openers, hidden = _openers(status, table, proc)
        files[status.st_ino] = LockFile(path, "baton", openers, hidden=hidden)
        files[status.st_ino].age_s = max(0.0, time.time() - status.st_mtime)
    return [lock for lock in files.values() if lock.path]


def _open_inodes(pid: int, proc: Path) -> Iterator[tuple[int, str]]:
    """Yield (inode, path) of each file that a process has open; nothing if this user is not allowed to see them."""
    try:
        for descriptor, target in open_files(pid, proc):
            if target.startswith("/") and not target.startswith(("/dev/", "/proc/", "/memfd:")):
                try:
                    yield os.stat(proc / str(pid) / "fd" / str(descriptor)).st_ino, target
                except OSError:
                    continue
    except PermissionError:
        return


def _path_of(entry: TableEntry, opened: Mapping[int, Mapping[int, str]]) -> str:
    """Return the path by which a process of the job opened the locked file; "inode N" if no process of the job did."""
    own = opened.get(entry.pid, {}).get(entry.inode)
    paths = [files[entry.inode] for files in opened.values() if entry.inode in files]
    return own or (paths[0] if paths else f"inode {entry.inode}")


def _lock_names(opened: Mapping[int, Mapping[int, str]]) -> dict[str, int]:
    """Return a dict from the path of each open file with a name like "x.lock" to a pid that has the file open.

    opened: for each pid, a dict from inode to the path of an open file
    """
    return {
        path: pid
        for pid, files in opened.items()
        for path in files.values()
        if os.path.basename(path) == "lock" or path.endswith((".lock", ".lck", "_lock", "_baton"))
    }


def _status(path: str, pid: int, proc: Path) -> os.stat_result | None:
    """Return the status of the file that has this path for the process ``pid``; None if there is no such regular file.

    The path is looked up in the mount namespace of that process, and if it is not there, in that of `collect`.
    """
    try:
        status = os.stat(f"{proc}/{pid}/root{path}")
    except OSError:
        try:
            status = os.stat(path)
        except OSError:
            return None
    return status if stat.S_ISREG(status.st_mode) else None


def _openers(status: os.stat_result, table: Iterable[int], proc: Path) -> tuple[list[int], int]:
    """Return the processes of ``table`` (pids) that have a file open; and a number of processes that possibly have.

    The number counts the Python processes of ``table`` whose open files this user is not allowed to see.

    status   the status of the file, which has its device and inode
    """
    openers, hidden = [], 0
    for pid in table:
        try:
            for descriptor, target in open_files(pid, proc):
                if not target.startswith("/"):
                    continue
                try:
                    opened = os.stat(proc / str(pid) / "fd" / str(descriptor))
                except OSError:
                    continue
                if (opened.st_dev, opened.st_ino) == (status.st_dev, status.st_ino):
                    openers.append(pid)
                    break
        except PermissionError:
            hidden += _is_python(pid, proc)
    return openers, hidden


def _is_python(pid: int, proc: Path) -> bool:
    """Whether a process probably runs Python, judged by its name, which every user is allowed to read."""
    try:
        return read_text(proc / str(pid) / "comm").startswith(("python", "pt_", "VLLM", "sglang", "ray"))
    except OSError:
        return False
