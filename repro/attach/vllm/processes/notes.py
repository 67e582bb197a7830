"""The notes file of an engine or a front end of vLLM: eight numbers by which this process says what it does.

The worker of the same rank reads these numbers. There is no lock, so the writer can change some numbers while the
worker reads them. Each single number is correct. A front end writes only its process id and its activity.
"""

from __future__ import annotations

import enum
import mmap
import os
from pathlib import Path

BYTES = 64


class Note(enum.IntEnum):
    """The index of each number in a notes file, by which an engine or a front end of vLLM says what it does.

    PID        process id of the writer
    COUNTED    number of executions of the model that the engine's loop has counted, over all waves
    SKIPPED    how many of the COUNTED executions the engine did not request from its worker
    FIRST      the number, from 1, of the first execution that the engine counted but did not request; 0 if there is
               none
    WAVES      number of waves that have ended
    ASKED      how many times the engine has begun to ask the other engines "is anyone unfinished?"
    ANSWERED   how many of these questions have ended
    ACTIVITY   what the process is doing, an Activity
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
    """What the process is doing.

    An engine writes WORKS, WAITS_FOR_REQUESTS or WAITS_FOR_WORKER. A front end writes WORKS, STARTS_ENGINE,
    WAITS_FOR_OUTPUTS or EXITS.
    """

    WORKS = 0
    WAITS_FOR_REQUESTS = 1
    WAITS_FOR_WORKER = 2
    STARTS_ENGINE = 3
    WAITS_FOR_OUTPUTS = 4
    EXITS = 5


class Notes:
    """The numbers in one notes file, by which an engine or a front end of vLLM says what it does.

    ``notes[Note.ASKED]`` reads or sets one number.
    """

    def __init__(self, buffer: mmap.mmap | bytearray) -> None:
        self.numbers = memoryview(buffer).cast("B")[:BYTES].cast("q")

    def __getitem__(self, note: Note) -> int:
        return self.numbers[note]

    def __setitem__(self, note: Note, number: int) -> None:
        self.numbers[note] = number


ENGINE, FRONT = "engine", "front"
"""The suffixes of the two notes files that a rank can have: of its engine, and of its front end."""


def path_of(root: Path, rank: int, kind: str = ENGINE) -> Path:
    """Return the path of the file in which an engine, or the front end of this engine, notes what it does.

    root: the folder of the job; rank: the rank of the engine's first worker; kind: ENGINE or FRONT
    """
    return root / "events" / f"rank{rank:03d}.{kind}"


def create(root: Path, rank: int, kind: str = ENGINE) -> Notes:
    """Create the file in which this process notes what it does.

    Raises FileExistsError if another process has created the file.

    root: the folder of the job; rank: the rank of the engine's first worker; kind: ENGINE or FRONT, whichever this
    process is
    """
    descriptor = os.open(path_of(root, rank, kind), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, BYTES)
        notes = Notes(mmap.mmap(descriptor, BYTES))
    finally:
        os.close(descriptor)
    notes[Note.PID] = os.getpid()
    return notes


def open_notes(root: Path, rank: int, kind: str = ENGINE) -> Notes | None:
    """Open the file in which an engine or a front end notes what it does. Returns None if it does not exist yet.

    root: the folder of the job; rank: the rank of the engine's first worker; kind: ENGINE or FRONT
    """
    try:
        descriptor = os.open(path_of(root, rank, kind), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size < BYTES:
            return None
        return Notes(mmap.mmap(descriptor, BYTES, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
