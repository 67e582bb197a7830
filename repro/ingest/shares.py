"""Read many files in several processes: the first share here, each other one in a child of this process."""

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
"""To start a child and to take over its records costs as much as to read about this much."""
MAX_SHARES = 8
"""Each child may hold a whole file in memory, unpacked."""

T = TypeVar("T")
Share = Sequence[tuple[Path, str]]
"""Files with the names by which they are called."""


def read_shares(files: Share, read: Callable[[Share], T]) -> Iterator[T]:
    """What `read` returns for consecutive shares of the files, in their order. Few files are one share.

    A child that ends without an answer, or that cannot be started, has its share read here.
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
    """Consecutive shares of about as many bytes."""
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
    except OSError:  # its reader reports it
        return 0


def _num_processors() -> int:
    """The processors that this process may use; 1 where it has other threads, which a fork would stop in their work."""
    try:
        return len(os.sched_getaffinity(0)) if len(os.listdir("/proc/self/task")) == 1 else 1
    except (AttributeError, OSError):  # not Linux
        return 1


@contextlib.contextmanager
def _child(share: Share, read: Callable[[Share], T]) -> Iterator[Connection]:
    """Start a child that reads a share, and yield the connection that its answer comes through."""
    answer, end = multiprocessing.Pipe(duplex=False)
    child = ForkProcess(target=_work, args=(share, read, end, answer))
    try:
        with contextlib.suppress(OSError):  # no room for a process: the connection closes without an answer
            child.start()
        end.close()
        yield answer
    finally:
        answer.close()
        if child.pid is not None:
            child.kill()
            child.join()


def _work(share: Share, read: Callable[[Share], T], end: Connection, answer: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    answer.close()  # so that a write fails once the parent has ended, and the child ends too
    with contextlib.suppress(BrokenPipeError):
        end.send(read(share))
