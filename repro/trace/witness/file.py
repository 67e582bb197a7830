"""Create and read witness files, and follow a file while its rank writes it.

    witness = read("runs/latest/events/rank000.wit")
    for event in witness.events(): ...

The layout of the file is described in :mod:`repro.trace.witness.format`. Reading never writes, locks or waits. The
files are untrusted. A part that does not match its checksum is left out, and ``witness.problems`` has a line about it:
"rank003.wit:38912: damage: event 118 does not match its checksum". Only a file without a usable header raises
:class:`WitnessError`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import sys
import zlib
from pathlib import Path
from typing import BinaryIO

from hybrid_moe_ref.files import open_regular, read_at_most
from repro.store.run_dir import SUFFIX
from repro.trace.witness.format import (
    GROUPS_AT,
    LIVE,
    LIVE_AT,
    MAX_BYTES,
    RECORD,
    WORD,
    Event,
    Geometry,
    Identity,
    is_whole,
    pack_header,
    unguarded,
)
from repro.trace.witness.group_slots import GroupTrace
from repro.trace.witness.parse import Problems, WitnessError, parse_header, parse_heartbeat
from repro.trace.witness.reader import Signature, Witness, parse

__all__ = [
    "MAX_BYTES", "Event", "GroupTrace", "Signature", "Tail", "Witness", "WitnessError", "create", "parse", "read",
    "read_dir",
]  # fmt: skip

_READS = 3
"""How many times a witness is read at most, if it has problems and its rank is still writing to it."""


def create(path: str | os.PathLike[str], writer: Identity, shape: Geometry | None = None) -> None:
    """Create a witness file, and allocate all its disk blocks.

    Raises OSError if the file exists or the disk is full. Without the allocation, a disk that becomes full later would
    end the rank, because a write into the mapped file would cause the signal SIGBUS.
    """
    shape = shape or Geometry()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, shape.file_bytes)
        os.pwrite(descriptor, pack_header(writer, shape), 0)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> Witness:
    """Read one witness file. Raises OSError or WitnessError.

    If the file has problems, its rank may be writing to it at this moment. So this function then reads the file again,
    up to _READS times in all, until the file has no problems or no longer changes.
    """
    data = _bytes_of(path)
    for _ in range(_READS - 1):
        with contextlib.suppress(WitnessError):
            witness = parse(data, str(path))
            if not witness.problems:
                return witness
        before = zlib.crc32(data)
        data = _bytes_of(path)
        if zlib.crc32(data) == before:
            break
    return parse(data, str(path))


def _bytes_of(path: str | os.PathLike[str]) -> bytes:
    """Return a copy of a witness file, read from front to back.

    The copy has the counter of size vectors as it was after the reading. So it shows which of these vectors the rank
    overwrote while the file was read.
    """
    place = slice(LIVE_AT + WORD.size, LIVE_AT + 2 * WORD.size)
    with _opened(path) as file:
        data = read_at_most(file, MAX_BYTES)
        file.seek(place.start)
        later = file.read(WORD.size)
    return data if data[place] == later else data[: place.start] + later + data[place.stop :]


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a witness file. Raises WitnessError if it is not a regular file, or is larger than a witness can be."""
    try:
        return open_regular(path, MAX_BYTES)
    except ValueError as error:
        raise WitnessError(str(error)) from None


def read_dir(path: str | os.PathLike[str]) -> tuple[dict[int, Witness], list[str]]:
    """Read all witnesses of a folder. Returns a dict from rank to witness, and a line for each file that is not usable.

    If two files are witnesses of the same rank, only the first is used.
    """
    witnesses: dict[int, Witness] = {}
    refused: list[str] = []
    for file in sorted(Path(path).glob(f"*{SUFFIX}")):
        try:
            witness = read(file)
        except (OSError, WitnessError) as error:
            refused.append(str(error))
            continue
        if witness.rank in witnesses:
            refused.append(
                f"{file}:0: not used, because {witnesses[witness.rank].name} is already the witness of rank "
                f"{witness.rank}"
            )
        else:
            witnesses[witness.rank] = witness
    return witnesses, refused


class Tail:
    """The live witness file of one rank, mapped into memory, so that its newest event can be polled at little cost."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _opened(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < GROUPS_AT:
                raise WitnessError(f"{self.path}:{size}: the file ends inside its header")
            self._map = _mapped(file)
        self._writer, self._shape = parse_header(self._map[:GROUPS_AT], str(self.path))
        self._num_events = 0
        self._last_event: Event | None = None
        self._beat_ns = 0

    def num_events(self) -> int:
        """Return the number of events that the rank has recorded."""
        self._num_events = max(self._num_events, unguarded(LIVE.unpack_from(self._map, LIVE_AT)[0]) or 0)
        return self._num_events

    def last_event_ns(self) -> int:
        """Return the time of the last event, heartbeats excluded, in ns of the rank's monotonic clock; 0 if none."""
        event = self.last_event()
        return event.t_ns if event else 0

    def last_event(self) -> Event | None:
        """Return the newest event; None if there is none, or if its record is damaged or not completely written."""
        num_events = self.num_events()
        if num_events == 0:
            return None
        if self._last_event is not None and self._last_event.n == num_events:  # a watcher asks many times in a poll
            return self._last_event
        at = self._shape.ring_at + (num_events - 1) % self._shape.ring_records * RECORD.size
        record = self._map[at : at + RECORD.size]
        event = Event._make(RECORD.unpack(record))
        self._last_event = event if event.n == num_events and is_whole(record) else None
        return self._last_event

    def heartbeat_ns(self) -> int:
        """Return the time of the last heartbeat in ns of the rank's monotonic clock; 0 if there is none."""
        self._beat_ns = parse_heartbeat(self._map[:GROUPS_AT], Problems(""))[0] or self._beat_ns
        return self._beat_ns

    def writer(self) -> Identity:
        """Return the process that writes the file. The pid in the result is 0 until the rank has opened the file."""
        if not self._writer.pid:
            with contextlib.suppress(WitnessError):  # the rank is writing its header
                self._writer = parse_header(self._map[:GROUPS_AT], str(self.path))[0]
        return self._writer

    def witness(self) -> Witness:
        """Read the whole file, as :func:`read` does."""
        return read(self.path)

    def close(self) -> None:
        self._map.close()


def _mapped(file: BinaryIO) -> mmap.mmap:
    """Map a witness file into memory, for reading.

    Before Python 3.13, each map keeps a file descriptor open, and a watcher maps many files. So this function then also
    raises the process's limit of open files to the highest value that the system permits.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
