"""Read many files in parallel: this process reads one share of the files, and a child process each other share."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import TypeVar

MIN_SHARE_BYTES = 4 << 20
"""A share has at least this size: to start a child and receive its records takes as long as to read so many bytes."""
MAX_SHARES = 8
"""Largest number of shares, because each child may hold a whole unpacked file in memory."""

T = TypeVar("T")
Share = Sequence[tuple[Path, str]]
"""Some of the files, each with the name that messages use for it."""


def read_shares(files: Share, read: Callable[[Share], T]) -> Iterator[T]:
    """Yield the result of `read` for each share of the files, in order. A few small files are one share.

    If a child cannot be started, or ends without an answer, this process reads its share.
    """
    first, *others = _shares(files)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_child(share, read)) for share in others]
        yield read(first)
        for share, answer in zip(others, children, strict=True):
            try:
                yield answer.recv()
            except (EOFError, OSError):
                yield read(share)


def _shares(files: Share) -> list[Share]:
    """Split the files into consecutive shares of roughly equal size in bytes."""
    sizes = [_size_of(path) for path, _ in files]
    total = sum(sizes)
    num_shares = max(1, min(_num_processors(), MAX_SHARES, total // MIN_SHARE_BYTES))
    shares: list[list[tuple[Path, str]]] = [[] for _ in range(num_shares)]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        shares[min(before * num_shares // max(total, 1), num_shares - 1)].append(file)
        before += size
    return list(shares)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # the reader of this file reports the error
        return 0


def _num_processors() -> int:
    """Return how many CPUs this process may use; 1 if it has other threads, because a fork would break them."""
    try:
        return len(os.sched_getaffinity(0)) if len(os.listdir("/proc/self/task")) == 1 else 1
    except (AttributeError, OSError):  # not Linux
        return 1


@contextlib.contextmanager
def _child(share: Share, read: Callable[[Share], T]) -> Iterator[Connection]:
    """Start a child that reads one share of the files, and yield the connection on which it sends the result."""
    answer, end = multiprocessing.Pipe(duplex=False)
    child = ForkProcess(target=_work, args=(share, read, end, answer))
    try:
        with contextlib.suppress(OSError):  # no process could be started: the connection closes without an answer
            child.start()
        end.close()
        yield answer
    finally:
        answer.close()
        if child.pid is not None:
            child.kill()
            child.join()


def _work(share: Share, read: Callable[[Share], T], end: Connection, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends its children
    answer.close()  # a write then fails once the parent has ended, so the child ends too
    with contextlib.suppress(BrokenPipeError):
        end.send(read(share))
