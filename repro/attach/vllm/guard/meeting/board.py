"""What an EngineCore and its workers tell each other: numbers in memory that they share.

The engine makes the memory and names it in its environment, which its workers inherit. The memory has no file, so
nothing is left of it when the processes end.
"""

from __future__ import annotations

import enum
import mmap
import os

VARIABLE = "HMR_GUARD_BOARD"
"""The path of the board, set by an engine for its workers."""

BYTES = 4096
RING = 64
_HOST = 2048  # offset at which the host of the store is written
_HOST_BYTES = 256


class Field(enum.IntEnum):
    """The index of each number. The engine writes all but PORT.

    ENGINE     process id of the engine
    REQUESTED  model executions that the engine requested from its workers
    COUNTED    executions that the engine's loop has counted, over all waves
    LEFT_OUT   the number of the first execution that it counted and did not request, from 1; 0 without one
    ASKED      questions "is anyone unfinished?" that it has begun
    ANSWERED   questions that have ended
    PORT       the port of the store in which the workers meet, once the vote has passed; the host stands apart
    FIRST      the first number of a ring: COUNTED when execution N was requested is FIRST + N % RING
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
    """The numbers of one engine, as ``board[Field.COUNTED]``."""

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self._bytes = memoryview(buffer)
        self._numbers = self._bytes[:_HOST].cast("q")

    def __getitem__(self, field: int) -> int:
        return self._numbers[field]

    def __setitem__(self, field: int, number: int) -> None:
        self._numbers[field] = number

    def request(self) -> None:
        """Note that the engine requests one more execution."""
        number = self[Field.REQUESTED] + 1
        self[Field.FIRST + number % RING] = self[Field.COUNTED]
        self[Field.REQUESTED] = number

    def counted_at(self, number: int) -> int:
        """Return how many executions the engine had counted when it requested this one; -1 if it did not request it."""
        requested_since = self[Field.REQUESTED] - number
        return self[Field.FIRST + number % RING] if number > 0 and 0 <= requested_since < RING else -1

    def executions(self) -> tuple[int, int]:
        """Return requested and counted executions. The counted ones are read first, so they never seem to be ahead."""
        counted = self[Field.COUNTED]
        return self[Field.REQUESTED], counted

    def questions(self) -> tuple[int, int]:
        """Return begun and ended questions "is anyone unfinished?"."""
        answered = self[Field.ANSWERED]
        return self[Field.ASKED], answered

    def meet_at(self, host: str, port: int) -> None:
        """Write the place of the store, for the engine."""
        text = host.encode()[:_HOST_BYTES]
        self._bytes[_HOST : _HOST + len(text)] = text
        self[Field.PORT] = port

    def meeting(self) -> tuple[str, int] | None:
        """Return host and port of the store; None while no worker has written them."""
        port = self[Field.PORT]
        if not port:
            return None
        return bytes(self._bytes[_HOST : _HOST + _HOST_BYTES]).rstrip(b"\0").decode(), port


def create() -> Board:
    """Make the board of this process and of those that it starts from now on. Raises OSError."""
    descriptor = os.memfd_create("hmr_guard")  # stays open: its path leads the workers to it
    os.ftruncate(descriptor, BYTES)
    os.environ[VARIABLE] = f"/proc/{os.getpid()}/fd/{descriptor}"
    board = Board(mmap.mmap(descriptor, BYTES))
    board[Field.ENGINE] = os.getpid()
    return board


def inherited() -> Board | None:
    """Return the board of the engine that started this process, or None."""
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
