"""A lock between processes that names its holder to those who wait, and limits how long they wait.

The lock itself is the kernel's (flock), so it ends with its holder, however that ends. The file names the holder, and
its modification time is the holder's sign of life. The file may stand in a folder that others can write to: what it
says is checked, and a link in its place is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hybrid_moe_ref.files import open_own, read_json

POLL_S = 0.05
BEAT_S = 0.5
STALE_S = 15.0
"""How old a holder's last sign of life may be: it gives one every BEAT_S, whatever it does."""

MAX_HOLDER_BYTES = 4096
MAX_PID = 2**31 - 1


class LockTimeout(RuntimeError):
    """A lock could not be had in time; the text names the file, its holder, since when, and the last sign of life."""


@dataclass(frozen=True)
class Holder:
    """Who holds the lock, since when (seconds of the epoch)."""

    rank: int
    pid: int
    host: str
    since: float

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Check what a lock file says, which anybody may have written; raises TypeError or ValueError."""
        holder = cls(**document)
        if type(holder.rank) is not int or type(holder.pid) is not int or not isinstance(holder.host, str):
            raise TypeError("rank and pid are integers, host is text")
        if not (abs(holder.rank) <= MAX_PID and 0 < holder.pid <= MAX_PID and holder.host.isprintable()):
            raise ValueError("no rank, pid and host of a process")
        if not math.isfinite(holder.since):
            raise ValueError("no time of the epoch")
        return holder

    def words(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host}), for {time.time() - self.since:.1f} s"


@dataclass
class BuildLock:
    """Hold it by ``with``; call `beat` at least every few seconds meanwhile.

    deadline_s   how long to wait for it
    tell         hears (event, name, pid) as an Observer's `local`: lock_wait, heartbeat, lock_held, lock_freed
    check        called while waiting; may raise

    Raises LockTimeout, and OSError where the folder cannot be written to, its file system has no locks, or the path is
    a link or anything else than a regular file.
    """

    path: Path
    rank: int
    deadline_s: float
    tell: Callable[[str, str, int], None] = lambda event, name, holder: None
    check: Callable[[], None] = lambda: None
    stale_s: float = STALE_S
    _descriptor: int = -1

    def __enter__(self) -> Self:
        started = beaten = heard = time.monotonic()
        last_sign, waiting = 0, False
        while not self._try():
            holder = self.holder()
            if not waiting:
                self.tell("lock_wait", str(self.path), holder.pid if holder else -1)
                waiting = True
            self.check()
            now = time.monotonic()
            if now - beaten > BEAT_S:
                beaten = now
                self.tell("heartbeat", f"waits for {self.path.name} of rank {holder.rank if holder else '?'}", -1)
            if (sign := self._sign_of_life()) != last_sign:  # a change that is seen here: no two clocks to compare
                last_sign, heard = sign, now
            if now - started > self.deadline_s or now - heard > self.stale_s:
                told = holder.words() if holder else "nobody who left a name"
                raise LockTimeout(f"{self.path} is held by {told}; last sign of life {now - heard:.1f} s ago")
            time.sleep(POLL_S)
        holder = Holder(self.rank, os.getpid(), socket.gethostname(), time.time())
        self.tell("lock_held", str(self.path), os.getpid())
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(asdict(holder)).encode(), 0)
        except OSError:  # the disk is full
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # the folder may have been taken away; the lock is not in it
            self.path.unlink()  # while it is held: who opened it before will see that it is another file by then
        os.close(self._descriptor)
        self.tell("lock_freed", str(self.path), -1)

    def beat(self) -> None:
        """Give a sign of life."""
        os.utime(self._descriptor)

    def holder(self) -> Holder | None:
        """The holder that the file names; None where it names none that could exist."""
        try:
            return Holder.from_json(read_json(self.path, MAX_HOLDER_BYTES))
        except (OSError, ValueError, TypeError):
            return None

    def _try(self) -> bool:
        """Take the lock if nobody has it. The file may be removed at any time by who had it."""
        descriptor = open_own(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), self.path.lstat()):
                self._descriptor = descriptor
                return True
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            if not os.fstat(descriptor).st_size:  # nobody has put a name in it, so it was made here
                self.path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)
        return False

    def _sign_of_life(self) -> int:
        try:
            return self.path.lstat().st_mtime_ns
        except OSError:
            return 0


@contextlib.contextmanager
def every(interval_s: float, call: Callable[[], Any]) -> Iterator[None]:
    """Call it now and then from a thread for the length of a ``with``."""
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
