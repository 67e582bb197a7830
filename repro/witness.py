"""Read what a rank left behind: a :class:`Witness` from a witness file, whole or torn, live or long dead.

    witness = read("runs/latest/events/rank000.wit")
    for event in witness.events(): ...

The layout is in :mod:`repro.layout`. Reading never writes, locks or waits, and trusts nothing: what does not match its
check is left out and named in ``witness.problems`` as ``file:offset: damage: what``; only a file without a usable
header is refused, with :class:`WitnessError`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hybrid_moe_ref.files import open_regular
from repro.group_slots import GroupTrace, parse_groups
from repro.layout import (
    ENTRY_SEPARATOR,
    GROUPS_AT,
    LIVE,
    LIVE_AT,
    MAX_BYTES,
    RECORD,
    SEPARATOR,
    Event,
    Geometry,
    Identity,
    Kind,
    column,
    is_whole,
    pack_header,
    unguarded,
)
from repro.parse import (
    Problems,
    Ring,
    WitnessError,
    parse_header,
    parse_heartbeat,
    parse_live,
    parse_ring,
    parse_strings,
    parse_vectors,
    vectors_named,
)

__all__ = [
    "MAX_BYTES", "Event", "GroupTrace", "Kind", "Signature", "Tail", "Witness", "WitnessError", "create", "parse",
    "persist", "read", "read_dir",
]  # fmt: skip

SUFFIX = ".wit"
_LOOKS = 3
"""How often a file is read before what is wrong with it counts: its writer may have been in the middle of a store."""


class Signature(NamedTuple):
    """What all ranks of a collective must share, apart from sizes and root."""

    group: str
    op: str
    layer: str
    dtype: str
    reduce_op: str


@dataclass(frozen=True, slots=True)
class Witness:
    """What one rank recorded.

    first_event  number of the oldest readable event: above 1 the ring has wrapped
    complete     False when the rank may have done more than can be read: newer events, or events in damaged places
    damaged      bytes of the file do not match their checks, so nothing certain follows from it
    problems     what is wrong with the file, one line each
    vectors      the words of each size vector that a record names, by (offset, length)
    """

    name: str
    who: Identity
    strings: list[str]
    groups: tuple[GroupTrace, ...]
    ring: Ring
    last: Event | None
    num_events: int
    first_event: int
    complete: bool
    damaged: bool
    heartbeat_ns: int
    heartbeat: str
    problems: tuple[str, ...]
    vectors: dict[tuple[int, int], bytes] = field(default_factory=dict, repr=False)
    shape: Geometry = field(default_factory=Geometry, repr=False)
    _signatures: dict[int, Signature] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return self.who.rank

    def last_event_ns(self) -> int:
        """When the rank last recorded anything but a heartbeat, 0 if never."""
        return self.last.t_ns if self.last else 0

    def line(self, n: int) -> str:
        """Where event ``n`` stands: "rank003.wit:38912 event 118"."""
        at = self.shape.ring_at + (n - 1) % self.shape.ring_records * RECORD.size
        return f"{self.name.rpartition('/')[2]}:{at} event {n}"

    @property
    def has_free_slots(self) -> bool:
        """Whether a group without a slot would have got one: then the rank has issued nothing in it."""
        return len(self.groups) < self.shape.group_slots

    def last_kind(self, group: tuple[str, tuple[int, ...]], seq: int) -> int | None:
        """What the rank last recorded about a collective: the kind of the event, None if the ring has lost it."""
        index = next((i for i, each in enumerate(self.groups) if (each.name, each.members) == group), None)
        if index is None:
            return None
        newest_first = zip(*(reversed(self.column(name)) for name in ("group", "seq", "kind")), strict=True)
        last = self.groups[index].last
        remembered = last.kind if last is not None and last.seq == seq else None
        return next((kind for place, number, kind in newest_first if (place, number) == (index, seq)), remembered)

    def events(self, newest: int | None = None) -> Iterator[Event]:
        """All readable events, or only so many of the newest; oldest first."""
        return self.ring.events(newest)

    def event(self, index: int) -> Event:
        """The readable event at a place, 0 the oldest."""
        return self.ring.event(index)

    def column(self, field: str) -> list[int]:
        """One field of all readable events, oldest first."""
        return column(self.ring.records, field)

    def text(self, string: int) -> str:
        """The interned string, or "?" where it was lost."""
        return self.strings[string] if string < len(self.strings) else "?"

    def signature(self, sig: int) -> Signature:
        """The signature of a collective's ``sig``."""
        signature = self._signatures.get(sig)
        if signature is None:
            signature = self._signatures[sig] = _signature(self.text(sig))
        return signature

    def schedule(self, sig: int) -> tuple[tuple[str, str, str], ...]:
        """The declared schedule of a STEP event's ``sig``: (group, op, layer) of each entry."""
        return _schedule(self.text(sig))

    def sizes(self, vector: int, num_sizes: int) -> tuple[int, ...]:
        """An event's size vector; empty where there was none, or it is overwritten or damaged."""
        if num_sizes <= 1:
            return (vector,) * num_sizes
        words = self.vectors.get((vector, num_sizes))
        return () if words is None else _sizes(words)


# Ranks say the same things: what one rank's text means is worked out once for all of them.


@lru_cache(maxsize=65_536)
def _signature(text: str) -> Signature:
    return Signature(*(text.split(SEPARATOR) + ["?"] * 5)[:5])


@lru_cache(maxsize=4096)
def _sizes(words: bytes) -> tuple[int, ...]:
    return tuple(memoryview(words).cast("q"))


@lru_cache(maxsize=1024)
def _schedule(text: str) -> tuple[tuple[str, str, str], ...]:
    entries = (entry.split(SEPARATOR) for entry in text.split(ENTRY_SEPARATOR) if entry)
    return tuple((group, op, layer) for group, op, layer in (e for e in entries if len(e) == 3))


def parse(data: bytes, name: str) -> Witness:
    """Everything readable in the bytes of a witness file. Raises WitnessError for bytes without a usable header."""
    who, shape = parse_header(data, name)
    problems = Problems(name)
    if len(data) < shape.file_bytes:
        problems.damage(len(data), f"the file ends early, {shape.file_bytes} bytes were laid out")
        data = data.ljust(GROUPS_AT, b"\0")
    live = parse_live(data, problems)
    strings = parse_strings(data, shape, live.strings, problems)
    ring = parse_ring(data, shape, live.events, problems)
    groups = parse_groups(data, shape, strings, ring, live.events or 0, problems)
    named = vectors_named(ring.records, [group.last for group in groups if group.last is not None])
    vectors = parse_vectors(data, shape, live.vector_words, named, problems)
    beat_ns, beat = parse_heartbeat(data, problems)
    known = all(group.members for group in groups)  # else what the rank did there cannot be set against its peers
    last = ring.last
    return Witness(
        name,
        who,
        strings,
        groups,
        ring,
        last,
        num_events=last.n if last else 0,
        first_event=ring.first,
        complete=known and not ring.torn and not problems.damaged,
        damaged=problems.damaged,
        heartbeat_ns=beat_ns,
        heartbeat=strings[beat] if beat < len(strings) else "?",
        problems=problems.lines(),
        vectors=vectors,
        shape=shape,
    )


# -- files -----------------------------------------------------------------------------------------------------------


def create(path: str | os.PathLike[str], who: Identity, shape: Geometry | None = None) -> None:
    """Make a witness file with all its blocks allocated: a full disk is an OSError here, not a SIGBUS later."""
    shape = shape or Geometry()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, shape.file_bytes)
        os.pwrite(descriptor, pack_header(who, shape), 0)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> Witness:
    """Read one witness file; OSError or WitnessError says why not.

    A problem that another look no longer shows was a store under way.
    """
    for _ in range(_LOOKS - 1):
        try:
            witness = _look(path)
        except WitnessError:
            continue
        if not witness.problems:
            return witness
    return _look(path)


def _look(path: str | os.PathLike[str]) -> Witness:
    with _opened(path) as file:
        return parse(file.read(MAX_BYTES), str(path))


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file of a size that a witness may have."""
    try:
        return open_regular(path, MAX_BYTES)
    except ValueError as error:
        raise WitnessError(str(error)) from None


def read_dir(path: str | os.PathLike[str]) -> tuple[dict[int, Witness], list[str]]:
    """All witnesses of a folder by rank, and one line for each file that could not be used."""
    witnesses: dict[int, Witness] = {}
    refused: list[str] = []
    for file in sorted(Path(path).glob(f"*{SUFFIX}")):
        try:
            witness = read(file)
        except (OSError, WitnessError) as error:
            refused.append(str(error))
            continue
        if witness.rank in witnesses:
            refused.append(f"{file}:0: {witnesses[witness.rank].name} is already the witness of rank {witness.rank}")
        else:
            witnesses[witness.rank] = witness
    return witnesses, refused


def persist(paths: Iterable[str | os.PathLike[str]], patience_s: float = 2.0) -> list[str]:
    """Force files and their folders to the disk, so that they outlive a reset of the machine.

    Return one line for each that is not there after ``patience_s`` seconds: a disk that hangs must not hang the caller.
    """
    files = [Path(path) for path in paths]
    waiting = dict.fromkeys((*files, *dict.fromkeys(file.parent for file in files)), "not on the disk yet")

    def sync() -> None:
        for path in tuple(waiting):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                waiting[path] = error.strerror or str(error)
            else:
                del waiting[path]

    thread = threading.Thread(target=sync, name="persist", daemon=True)
    thread.start()
    thread.join(patience_s)
    return [f"{path}: {why}" for path, why in tuple(waiting.items())]


class Tail:
    """A cheap look at a live witness file, to be polled many times a second."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _opened(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < GROUPS_AT:
                raise WitnessError(f"{self.path}:{size}: the file ends inside its header")
            self._map = _mapped(file)
        self._who, self._shape = parse_header(self._map[:GROUPS_AT], str(self.path))
        self._num_events = 0
        self._beat_ns = 0

    def num_events(self) -> int:
        """How many events the rank has recorded."""
        self._num_events = max(self._num_events, unguarded(LIVE.unpack_from(self._map, LIVE_AT)[0]) or 0)
        return self._num_events

    def last_event_ns(self) -> int:
        """When the rank last recorded anything but a heartbeat, 0 if never."""
        event = self.last_event()
        return event.t_ns if event else 0

    def last_event(self) -> Event | None:
        """The newest record alone; None when there is none or it is being written just now."""
        num_events = self.num_events()
        if num_events == 0:
            return None
        at = self._shape.ring_at + (num_events - 1) % self._shape.ring_records * RECORD.size
        record = self._map[at : at + RECORD.size]
        event = Event._make(RECORD.unpack(record))
        return event if event.n == num_events and is_whole(record) else None

    def heartbeat_ns(self) -> int:
        """When the last heartbeat came, 0 if never."""
        self._beat_ns = parse_heartbeat(self._map[:GROUPS_AT], Problems(""))[0] or self._beat_ns
        return self._beat_ns

    def who(self) -> Identity:
        """The writer; its pid is 0 until the rank has opened the file."""
        if not self._who.pid:
            with contextlib.suppress(WitnessError):  # the rank is just writing its header
                self._who = parse_header(self._map[:GROUPS_AT], str(self.path))[0]
        return self._who

    def witness(self) -> Witness:
        """Read the whole file."""
        return read(self.path)

    def close(self) -> None:
        self._map.close()


def _mapped(file: BinaryIO) -> mmap.mmap:
    """Map a file. Before Python 3.13 the map keeps a descriptor, and a watcher has one for every rank."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
