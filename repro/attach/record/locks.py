"""Record waits for lock files: flock and lockf, filelock, and FileBaton, the lock of torch's extension builds."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from repro.attach.record import rank as this
from repro.attach.record.imports import replace

_thread = threading.local()  # true while a library takes its lock: the flock call inside is not recorded again


def hook_fcntl(module: ModuleType) -> None:
    nonblocking, unlock = module.LOCK_NB, module.LOCK_UN

    def recorded(original: Any) -> Any:
        def lock(fd: Any, operation: int, *rest: Any) -> Any:
            rank = this.current
            if rank is None or getattr(_thread, "inside", False):
                return original(fd, operation, *rest)
            name = _file_name(fd)
            if operation & unlock:
                result = original(fd, operation, *rest)
                rank.local_event("lock_freed", name)
                return result
            if not operation & nonblocking:
                rank.local_event("lock_wait", name)
            result = original(fd, operation, *rest)
            rank.local_event("lock_held", name)
            return result

        return lock

    replace(module, "flock", recorded)
    replace(module, "lockf", recorded)


def hook_filelock(module: ModuleType) -> None:
    """Hook filelock's base class, to record when a rank waits for a lock, gets it and releases it.

    If a process acquires a lock again that it already holds, the recorder ignores this call.
    """
    owner = module.BaseFileLock

    def acquiring(original: Any) -> Any:
        def acquire(self: Any, *args: Any, **options: Any) -> Any:
            rank = this.current
            if rank is None or self.is_locked:
                return original(self, *args, **options)
            rank.local_event("lock_wait", str(self.lock_file))
            with _inside():
                result = original(self, *args, **options)
            rank.local_event("lock_held", str(self.lock_file))
            return result

        return acquire

    def releasing(original: Any) -> Any:
        def release(self: Any, *args: Any, **options: Any) -> Any:
            held = self.is_locked
            with _inside():
                result = original(self, *args, **options)
            if this.current is not None and held and not self.is_locked:
                this.current.local_event("lock_freed", str(self.lock_file))
            return result

        return release

    replace(owner, "acquire", acquiring)
    replace(owner, "release", releasing)


def hook_file_baton(module: ModuleType) -> None:
    owner = module.FileBaton

    def waiting(original: Any) -> Any:
        def wait(self: Any) -> Any:
            rank = this.current
            if rank is None:
                return original(self)
            rank.local_event("lock_wait", str(self.lock_file_path))
            result = original(self)
            # The baton file is gone, so no process holds the lock.
            rank.local_event("lock_held", str(self.lock_file_path))
            rank.local_event("lock_freed", str(self.lock_file_path))
            return result

        return wait

    def trying(original: Any) -> Any:
        def try_acquire(self: Any) -> Any:
            acquired = original(self)
            if acquired and this.current is not None:
                this.current.local_event("lock_held", str(self.lock_file_path))
            return acquired

        return try_acquire

    def releasing(original: Any) -> Any:
        def release(self: Any) -> Any:
            result = original(self)
            if this.current is not None:
                this.current.local_event("lock_freed", str(self.lock_file_path))
            return result

        return release

    replace(owner, "wait", waiting)
    replace(owner, "try_acquire", trying)
    replace(owner, "release", releasing)


@contextlib.contextmanager
def _inside() -> Iterator[None]:
    outer, _thread.inside = getattr(_thread, "inside", False), True
    try:
        yield
    finally:
        _thread.inside = outer


def _file_name(fd: Any) -> str:
    number = fd if isinstance(fd, int) else fd.fileno()
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return f"file descriptor {number}"
