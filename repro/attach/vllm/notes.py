"""What an EngineCore reports about itself: eight numbers in a file that the worker of its rank reads.

The engine writes them as it goes, and neither waits for the other. A reader may see the numbers of two moments; each
number alone is whole.
"""

from __future__ import annotations

import enum
import mmap
import os
from pathlib import Path

BYTES = 64


class Note(enum.IntEnum):
    """The index of each number in the file.

    PID        process id of the engine
    COUNTED    executions that the engine's loop has counted, over all waves
    SKIPPED    those of them that the engine did not request from its worker
    FIRST      the number of the first of them, counted from 1; 0 without any
    WAVES      waves that have ended
    ASKED      questions "is anyone unfinished?" that the engine has begun
    ANSWERED   questions that have ended
    ACTIVITY   an Activity
    """

    PID = 0
    COUNTED = 1
    SKIPPED = 2
    FIRST = 3
    WAVES = 4
    ASKED = 5
    ANSWERED = 6
    ACTIVITY = 7


class Activity(enum.IntEnum):
    """What the engine is doing."""

    WORKS = 0
    WAITS_FOR_REQUESTS = 1
    WAITS_FOR_WORKER = 2


class Notes:
    """The numbers of one engine, as ``notes[Note.ASKED]``."""

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self._numbers = memoryview(buffer).cast("B")[:BYTES].cast("q")

    def __getitem__(self, note: Note) -> int:
        return self._numbers[note]

    def __setitem__(self, note: Note, number: int) -> None:
        self._numbers[note] = number


def path_of(root: Path, rank: int) -> Path:
    """Return the path of the notes of the engine whose first worker is ``rank``."""
    return root / "events" / f"rank{rank:03d}.engine"


def create(root: Path, rank: int) -> Notes:
    """Create the notes of this process. Raises FileExistsError if another engine has created them."""
    descriptor = os.open(path_of(root, rank), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, BYTES)
        notes = Notes(mmap.mmap(descriptor, BYTES))
    finally:
        os.close(descriptor)
    notes[Note.PID] = os.getpid()
    return notes


def open_notes(root: Path, rank: int) -> Notes | None:
    """Open the notes of an engine; None if they do not exist yet."""
    try:
        descriptor = os.open(path_of(root, rank), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size < BYTES:
            return None
        return Notes(mmap.mmap(descriptor, BYTES, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
