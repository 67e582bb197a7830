"""A lock between processes that names its holder to the waiting processes, and limits how long they wait.

The lock is a flock, which the operating system releases when its holder ends, however it ends. The lock file names the
holder, and its modification time is the holder's last heartbeat. Other users can possibly write to the folder of the
file. So the content of the file is checked, and a symbolic link is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

POLL_S = 0.05
BEAT_S = 0.5
STALE_S = 15.0
"""Largest age in seconds of a holder's last heartbeat. A holder sends one every BEAT_S seconds."""

MAX_HOLDER_BYTES = 4096
MAX_PID = 2**31 - 1


class LockTimeout(RuntimeError):
    """A process could not take a lock within its deadline, or the lock's holder has sent no heartbeat for too long.

    The message names the lock file, the holder, for how long the holder has had the lock, and the age of its last
    heartbeat.
    """


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and since when (seconds since the epoch). rank: -1 if the process has none."""

    rank: int
    pid: int
    host: str
    since: float

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Check the content of a lock file, because any process can write it. Raises TypeError or ValueError."""
        holder = cls(**document)
        if type(holder.rank) is not int or type(holder.pid) is not int or not isinstance(holder.host, str):
            raise TypeError("rank and pid must be integers, and host must be text")
        if not (abs(holder.rank) <= MAX_PID and 0 < holder.pid <= MAX_PID and holder.host.isprintable()):
            raise ValueError("rank, pid or host cannot be that of a process")
        if not math.isfinite(holder.since):
            raise ValueError("since must be a time in seconds since the epoch")
        return holder

    @property
    def name(self) -> str:
        """Return the name of the holder: "rank 3", or "pid 42" if the process has no rank."""
        return f"rank {self.rank}" if self.rank >= 0 else f"pid {self.pid}"

    def words(self) -> str:
        """Return the holder as text: "rank 3 (pid 42 on host), for 1.5 s"."""
        process = f"(pid {self.pid} on {self.host})" if self.rank >= 0 else f"on {self.host}"
        return f"{self.name} {process}, for {time.time() - self.since:.1f} s"


@dataclass
class BuildLock:
    """A lock that a process holds inside a ``with`` block.

    The holder must call `beat` at least once in every `stale_s` seconds.

    path         the lock file, which is created at the start of the block and removed at its end
    rank         this process's rank, which is written into the file; -1 if the process has none
    deadline_s   how many seconds to wait for the lock
    notify       called with (event, name, pid), like `Observer.local`: lock_wait, heartbeat, lock_held, lock_freed
    check        called again and again while this process waits; if it raises an exception, the wait ends with it
    stale_s      how many seconds to wait for a holder that sends no heartbeat

    The start of the block raises LockTimeout if the lock is not free in time. It raises OSError if the folder cannot be
    written to, its file system has no locks, or the path is not a regular file.
    """

    path: Path
    rank: int = -1
    deadline_s: float = 600.0
    notify: Callable[[str, str, int], None] = lambda event, name, holder: None
    check: Callable[[], None] = lambda: None
    stale_s: float = STALE_S
    _descriptor: int = -1

    def __enter__(self) -> Self:
        started = own_beat = holder_beat = time.monotonic()
        last_beat_ns, waiting = 0, False
        while not self._try():
            holder = self.holder()
            if not waiting:
                self.notify("lock_wait", str(self.path), holder.pid if holder else -1)
                waiting = True
            self.check()
            now = time.monotonic()
            if now - own_beat > BEAT_S:
                own_beat = now
                self.notify("heartbeat", f"waits for {self.path.name} of {holder.name if holder else '?'}", -1)
            # only compare whether the time changes, because the clocks of hosts may differ
            if (beat_ns := self._last_beat_ns()) != last_beat_ns:
                last_beat_ns, holder_beat = beat_ns, now
            if now - started > self.deadline_s or now - holder_beat > self.stale_s:
                process = holder.words() if holder else "an unnamed process"
                raise LockTimeout(
                    f"{self.path} is held by {process}; its last heartbeat was {now - holder_beat:.1f} s ago"
                )
            time.sleep(POLL_S)
        holder = Holder(self.rank, os.getpid(), socket.gethostname(), time.time())
        self.notify("lock_held", str(self.path), os.getpid())
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(asdict(holder)).encode(), 0)
        except OSError:  # the disk is full
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # the folder may have been removed; the lock does not depend on the file
            # done while the lock is held: another process that opened the file can then see that it is not the lock
            # file any more
            self.path.unlink()
        os.close(self._descriptor)
        self.notify("lock_freed", str(self.path), -1)

    def beat(self) -> None:
        """Send a heartbeat: set the file's modification time."""
        os.utime(self._descriptor)

    def holder(self) -> Holder | None:
        """Return the holder that the file names; None if the file names no valid process."""
        try:
            descriptor = _open(self.path, os.O_RDONLY)
            try:
                text = os.read(descriptor, MAX_HOLDER_BYTES + 1)
                return Holder.from_json(json.loads(text)) if len(text) <= MAX_HOLDER_BYTES else None
            finally:
                os.close(descriptor)
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def _try(self) -> bool:
        """Take the lock if it is free, and return whether this process has it now.

        The result is also False if the previous holder has just removed the file, because then the lock is no longer at
        this path.
        """
        descriptor = _open(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), self.path.lstat()):
                self._descriptor = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            if not os.fstat(descriptor).st_size:  # this process created the empty file; no holder wrote it
                self.path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)
        return False

    def _last_beat_ns(self) -> int:
        try:
            return self.path.lstat().st_mtime_ns
        except OSError:
            return 0


def _open(path: Path, flags: int) -> int:
    """Open a regular file. Raises OSError for a symbolic or hard link, a pipe, a device or a folder."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{path.name} is a symbolic link", str(path)) from None
        raise
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    wrong = "a hard link to another file" if stat.S_ISREG(status.st_mode) else "not a regular file"
    raise OSError(errno.EINVAL, f"{path.name} is {wrong}", str(path))


@contextlib.contextmanager
def every(interval_s: float, call: Callable[[], Any]) -> Iterator[None]:
    """Call ``call`` every ``interval_s`` seconds from a thread while the ``with`` block runs."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(interval_s):
            call()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
