"""Read many files in parallel.

The list of files is split into parts, the shares. This process reads the files of the first share. A child process
of its own reads each of the other shares.
"""

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
"""The smallest share for which a child process pays off: in the time to start a child and to receive its records, this
process could read as many bytes itself."""
MAX_SHARES = 8
"""The largest number of shares. It limits the memory, because each child may have a whole unpacked file in memory."""

T = TypeVar("T")
Share = Sequence[tuple[Path, str]]
"""The files that one process reads: (path, name for messages) of each."""


def read_shares(files: Share, read: Callable[[Share], T]) -> Iterator[T]:
    """Split the files into shares, call `read` for each share, and yield the results in the order of the files.

    This process reads the first share, and a child process each of the other shares. If the files are small, all files
    are in one share. If a child process cannot be started, or ends without a result, this process reads its share.

    files: (path, name for messages) of each file
    read: reads the files of one share, that is a part of the list ``files``; its result is yielded
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
    """Return how many processes can read at the same time: one for each processor that this process can use.

    Return 1 if this process has several threads, because `_child` makes processes by fork, which is not safe with
    threads. Return 1 also on systems other than Linux.
    """
    try:
        return len(os.sched_getaffinity(0)) if len(os.listdir("/proc/self/task")) == 1 else 1
    except (AttributeError, OSError):  # not Linux
        return 1


@contextlib.contextmanager
def _child(share: Share, read: Callable[[Share], T]) -> Iterator[Connection]:
    """Start a child process that calls ``read(share)``. Yield the connection that receives the result.

    share: the files that the child reads, each as (path, name for messages)
    """
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
    answer.close()  # this copy of the parent's end; without it, a write fails after the parent has ended
    with contextlib.suppress(BrokenPipeError):
        end.send(read(share))
