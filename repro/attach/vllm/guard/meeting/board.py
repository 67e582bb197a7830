"""The board: numbers in memory that an engine of vLLM shares with its workers.

The engine creates the memory and puts its path into an environment variable, which its workers inherit. The memory is a
memfd, which is no file on a disk, so nothing is left when the processes have ended.

The board has two counts of executions of the model. In each turn of its loop, an engine requests an execution from its
workers (REQUESTED), and then counts one execution (COUNTED). If an engine wrongly leaves out the request, it still
counts the execution. So if more executions are counted than requested, the engine has left out a request.
"""

from __future__ import annotations

import enum
import mmap
import os

VARIABLE = "HMR_GUARD_BOARD"
"""The environment variable with the path of the board. An engine sets it for its workers."""

BYTES = 4096
RING = 64
_HOST = 2048  # offset at which the host of the store is written
_HOST_BYTES = 256


class Field(enum.IntEnum):
    """The index of each number on the board, which is memory that an engine of vLLM shares with its workers.

    The engine writes all numbers but PORT, which a worker writes.

    ENGINE     process id of the engine
    REQUESTED  how many executions of the model the engine has requested from its workers
    COUNTED    how many executions are over, as the engine counts them: one in each turn of its loop, over all waves.
               An engine can wrongly count an execution that it did not request
    LEFT_OUT   the number, from 1, of the first execution that the engine counted but did not request; 0 if there is
               none
    ASKED      how many times the engine has begun to ask the other engines "is anyone unfinished?"
    ANSWERED   how many of these questions have ended
    PORT       the port of torch's store, to which the workers are connected; 0 until a worker has written it. The host
               is at the offset _HOST
    FIRST      the first index of a ring buffer of RING numbers: index FIRST + N % RING has the value that COUNTED had
               when the engine requested execution N
    """

    ENGINE = 0
    REQUESTED = 1
    COUNTED = 2
    LEFT_OUT = 3
    ASKED = 4
    ANSWERED = 5
    PORT = 6
    FIRST = 16


class Board:
    """The numbers in the memory that one engine of vLLM shares with its workers.

    ``board[Field.COUNTED]`` reads or sets a number.
    """

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self._bytes = memoryview(buffer)
        self._numbers = self._bytes[:_HOST].cast("q")

    def __getitem__(self, field: int) -> int:
        return self._numbers[field]

    def __setitem__(self, field: int, number: int) -> None:
        self._numbers[field] = number

    def request(self) -> None:
        """Note that the engine requests one more execution of the model from its workers."""
        number = self[Field.REQUESTED] + 1
        self[Field.FIRST + number % RING] = self[Field.COUNTED]
        self[Field.REQUESTED] = number

    def counted_at(self, number: int) -> int:
        """Return how many executions the engine had counted when it requested execution ``number`` (from 1).

        A correct engine has counted all earlier executions by then, so the result is ``number`` - 1. A higher result
        shows that the engine counted an execution that it had not requested.

        Returns -1 if the execution is too old, or has not been requested.
        """
        requested_since = self[Field.REQUESTED] - number
        return self[Field.FIRST + number % RING] if number > 0 and 0 <= requested_since < RING else -1

    def executions(self) -> tuple[int, int]:
        """Return how many executions the engine has requested, and how many it has counted.

        The second number is read first. In the other order, an execution that the engine requests and counts between
        the two reads would look as if it had been counted, but not requested.
        """
        counted = self[Field.COUNTED]
        return self[Field.REQUESTED], counted

    def questions(self) -> tuple[int, int]:
        """Return how many questions "is anyone unfinished?" the engine has begun to ask, and how many of them have
        ended."""
        answered = self[Field.ANSWERED]
        return self[Field.ASKED], answered

    def meet_at(self, host: str, port: int) -> None:
        """Write host and port of torch's store, which the workers use, so that the engine can connect to it."""
        text = host.encode()[:_HOST_BYTES]
        self._bytes[_HOST : _HOST + len(text)] = text
        self[Field.PORT] = port

    def meeting(self) -> tuple[str, int] | None:
        """Return host and port of torch's store, which the workers use; None while no worker has written them."""
        port = self[Field.PORT]
        if not port:
            return None
        return bytes(self._bytes[_HOST : _HOST + _HOST_BYTES]).rstrip(b"\0").decode(), port


def create() -> Board:
    """Create the memory that this engine will share with its workers. Raises OSError.

    Call this before the workers start. They open the memory by `inherited`.
    """
    descriptor = os.memfd_create("hmr_guard")  # stays open, because the workers open its path in /proc
    os.ftruncate(descriptor, BYTES)
    os.environ[VARIABLE] = f"/proc/{os.getpid()}/fd/{descriptor}"
    board = Board(mmap.mmap(descriptor, BYTES))
    board[Field.ENGINE] = os.getpid()
    return board


def inherited() -> Board | None:
    """Open the memory that the engine which started this process shares with its workers.

    Returns None if there is no such memory or it cannot be opened.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return Board(mmap.mmap(descriptor, BYTES))
    finally:
        os.close(descriptor)
