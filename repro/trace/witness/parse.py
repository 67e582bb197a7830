"""Parse the areas of an untrusted witness file: header, counters, strings, size vectors, events.

Data that does not match its checksum is reported as a problem and left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from repro.trace.knowledge import EVERYTHING, WITNESS, Knows
from repro.trace.witness.format import (
    CRC,
    HEADER,
    HEART,
    HEART_AT,
    KNOWS,
    KNOWS_AT,
    LIVE,
    LIVE_AT,
    MAGIC,
    MAX_STRINGS,
    NO_VECTOR,
    RECORD,
    STRING,
    VERSION,
    WORD,
    Event,
    Geometry,
    Identity,
    Kind,
    column,
    is_whole,
    unguarded,
)

MAX_PROBLEMS = 20
_KINDS = frozenset(int(kind) for kind in Kind)
_EMPTY = bytes(RECORD.size)
_ISSUES = (int(Kind.ENTER), int(Kind.ISSUE))


class WitnessError(ValueError):
    """A file that cannot be used as a witness, for example because its header is damaged or has another version."""


@dataclass(slots=True)
class Problems:
    """The problems found in one file, as lines: "rank003.wit:38912: damage: event 118 does not match its checksum".

    If a rank dies while it writes, its last record is incomplete ("torn"). This is a problem, but no damage.
    """

    name: str
    damaged: bool = False
    _lines: list[str] = field(default_factory=list)
    _more: int = 0

    def damage(self, at: int, what: str) -> None:
        self.damaged = True
        self._add(f"{self.name}:{at}: damage: {what}")

    def torn(self, at: int) -> None:
        self._add(f"{self.name}:{at}: torn record: the rank had not finished writing it")

    def _add(self, line: str) -> None:
        if len(self._lines) < MAX_PROBLEMS:
            self._lines.append(line)
        else:
            self._more += 1

    def lines(self) -> tuple[str, ...]:
        more = [f"{self.name}: {self._more} further problems"] if self._more else []
        return (*self._lines, *more)


class Live(NamedTuple):
    """Four counters in a witness, in which the writer counts what it has written. A damaged counter is None.

    events         events that are recorded completely
    vector_words   words of 8 bytes used for size vectors since the file was created, overwritten words included
    strings        strings
    groups         groups with a slot, that is, whose progress is stored
    """

    events: int | None
    vector_words: int | None
    strings: int | None
    groups: int | None


@dataclass(frozen=True, slots=True)
class Ring:
    """The newest events of a witness that have no gap between them, oldest first. A damaged record is a gap.

    records   the packed events
    torn      whether an incomplete record follows the last event: the writer died before it finished this record
    """

    records: bytes
    torn: bool = False

    @property
    def first(self) -> int:
        """Return the number of the oldest event that can be read; 0 if there is none. Events are counted from 1."""
        return self.event(0).n if self.records else 0

    @property
    def last(self) -> Event | None:
        return self.event(len(self.records) // RECORD.size - 1) if self.records else None

    def event(self, index: int) -> Event:
        """Return the event at an index; 0 is the oldest."""
        return Event._make(RECORD.unpack_from(self.records, index * RECORD.size))

    def events(self, newest: int | None = None) -> Iterator[Event]:
        """Yield the events, oldest first: all, or only the last ``newest`` ones."""
        start = 0 if newest is None else max(0, len(self.records) - newest * RECORD.size)
        return map(Event._make, RECORD.iter_unpack(memoryview(self.records)[start:]))


def parse_header(data: bytes, name: str) -> tuple[Identity, Geometry]:
    """Parse the header of a witness file. Return the writer, and the sizes of the file's areas.

    Raises WitnessError ("file:offset: problem") if the header is not usable.
    """
    if len(data) < HEADER.size + CRC.size:
        raise WitnessError(f"{name}:{len(data)}: the file ends inside its header")
    magic, version, record_bytes, rank, num_ranks, *rest = HEADER.unpack_from(data)
    *areas, pid, start, namespace, offset, run, host, boot = rest
    if magic != MAGIC:
        raise WitnessError(f"{name}:0: this is not a witness file")
    if version != VERSION:
        raise WitnessError(
            f"{name}:8: the witness has version {version}, but this release reads only version {VERSION}"
        )
    if CRC.unpack_from(data, HEADER.size)[0] != zlib.crc32(data[: HEADER.size]):
        raise WitnessError(f"{name}:{HEADER.size}: damage: the header does not match its checksum")
    if record_bytes != RECORD.size or rank >= num_ranks:
        raise WitnessError(
            f"{name}:12: the header says rank {rank} of {num_ranks}, with records of {record_bytes} bytes; a rank is "
            f"below the number of ranks, and a record has {RECORD.size} bytes"
        )
    try:
        shape = Geometry(*areas)
    except ValueError as error:
        raise WitnessError(f"{name}:24: {error}") from None
    run_id, hostname, boot_id = (text.rstrip(b"\0").decode(errors="replace") for text in (run, host, boot))
    knows = unguarded(KNOWS.unpack_from(data, KNOWS_AT)[0]) if len(data) >= LIVE_AT else 0
    if knows is None or knows > EVERYTHING.value:
        raise WitnessError(f"{name}:{KNOWS_AT}: damage: the list of recorded aspects does not match its checksum")
    aspects = Knows(knows) if knows else WITNESS
    return Identity(rank, num_ranks, run_id, hostname, boot_id, pid, start, namespace, offset, aspects), shape


def parse_live(data: bytes, problems: Problems) -> Live:
    live = Live._make(map(unguarded, LIVE.unpack_from(data, LIVE_AT)))
    for place, (count, what) in enumerate(zip(live, Live._fields, strict=True)):
        if count is None:
            problems.damage(
                LIVE_AT + place * WORD.size, f"the number of {what.replace('_', ' ')} does not match its checksum"
            )
    return live


def parse_heartbeat(data: bytes, problems: Problems) -> tuple[int, int]:
    """Return two values of the last heartbeat: its time in ns, and the number of the string that has its name.

    Return (0, 0) if no heartbeat is readable.
    """
    at_ns, name, _, check = HEART.unpack_from(data, HEART_AT)
    body = data[HEART_AT : HEART_AT + HEART.size - CRC.size]
    if check == zlib.crc32(body):
        return at_ns, name
    if check or body.strip(b"\0"):
        problems.damage(HEART_AT, "the heartbeat does not match its checksum")
    return 0, 0


def parse_strings(data: bytes, shape: Geometry, stored: int | None, problems: Problems) -> list[str]:
    """Return the strings up to the first damaged one. The number of a string is its index in the list.

    stored   how many strings the writer has counted; None if the counter is damaged
    """
    strings = [""]
    at, end = shape.strings_at, min(shape.file_bytes, len(data))
    while at + STRING.size <= end:
        length, check = STRING.unpack_from(data, at)
        if length == 0:
            break
        if len(strings) > MAX_STRINGS:
            problems.damage(at, f"more than {MAX_STRINGS} strings")
            return strings
        text = data[at + STRING.size : at + STRING.size + length]
        if at + STRING.size + length > end or zlib.crc32(text, length) != check:
            problems.damage(
                at, f"string {len(strings)} does not match its checksum; this string and those after it are lost"
            )
            return strings
        strings.append(text.decode(errors="replace"))
        at += STRING.size + length
    if stored is not None and stored >= len(strings):
        problems.damage(at, f"string {len(strings)} of {stored} is missing")
    return strings


def parse_vectors(
    data: bytes, shape: Geometry, stored: int | None, named: Iterable[tuple[int, int]], problems: Problems
) -> dict[tuple[int, int], bytes]:
    """Return the bytes of the size vectors that are neither overwritten nor damaged, by (offset, number of sizes).

    A size vector has the sizes of one collective.

    stored   how many 8-byte words of size vectors the writer has stored since the file was created; None if the counter
             is damaged
    named    the vectors that records refer to: (offset, number of sizes) of each
    """
    vectors = {}
    room = shape.vector_words
    for offset, num_sizes in sorted(named):
        if offset == NO_VECTOR or (stored is not None and offset < stored - room):
            continue
        at = shape.vectors_at + offset % room * WORD.size
        start, end = at + WORD.size, at + (1 + num_sizes) * WORD.size
        if end <= min(shape.strings_at, len(data)):
            words = data[start:end]
            if WORD.unpack_from(data, at)[0] == zlib.crc32(words, offset & 0xFFFFFFFF):
                vectors[offset, num_sizes] = words
                continue
        if stored is not None:  # if the counter is damaged, the vector may have been overwritten, which is no damage
            problems.damage(at, f"{num_sizes} sizes do not match their checksum")
    return vectors


def vectors_named(records: bytes, more: Iterable[Event]) -> set[tuple[int, int]]:
    """Return (offset, number of sizes) of each size vector to which the packed `records` and the events `more` refer.

    A collective with a single size has no size vector, because its record has the size itself.
    """
    columns = zip(*(column(records, name) for name in ("kind", "vector", "num_sizes")), strict=True)
    named = {(vector, num_sizes) for kind, vector, num_sizes in columns if num_sizes > 1 and kind in _ISSUES}
    return named | {(event.vector, event.num_sizes) for event in more if event.num_sizes > 1}


def parse_ring(data: bytes, shape: Geometry, counted: int | None, problems: Problems) -> Ring:
    """Return the newest intact events that have no gap between them.

    counted   how many events the writer has counted; None if the counter is damaged
    """
    capacity = shape.ring_records
    used = min(counted + 1, capacity) if counted else capacity
    whole = max(0, min(used, (len(data) - shape.ring_at) // RECORD.size))
    slots = memoryview(data)[shape.ring_at : shape.ring_at + whole * RECORD.size]
    newest = max(column(slots, "n"), default=0)
    cut = newest % capacity * RECORD.size if newest > capacity else 0
    records = b"".join((slots[cut:], slots[:cut])) if cut else bytes(slots[: newest * RECORD.size])
    if counted == 0 and newest > 1:
        problems.damage(LIVE_AT, "the number of events is missing")
    begun = b"" if cut else bytes(slots[newest * RECORD.size : (newest + 1) * RECORD.size]).strip(b"\0")
    if begun or not _is_sound(records, newest):
        return _salvage(slots, shape, counted or 0, problems)
    if counted is not None and counted > newest and len(data) >= shape.file_bytes:
        problems.damage(shape.ring_at + newest % capacity * RECORD.size, f"event {newest + 1} of {counted} is missing")
    return Ring(records)


def _is_sound(records: bytes, newest: int) -> bool:
    """Whether all records are intact, and their events are numbered without a gap up to ``newest``."""
    return (
        is_whole(records)
        and column(records, "n") == list(range(newest - len(records) // RECORD.size + 1, newest + 1))
        and _KINDS.issuperset(column(records, "kind"))
    )


def _salvage(slots: memoryview, shape: Geometry, counted: int, problems: Problems) -> Ring:
    """Return the newest intact events that have no gap between them, although some records are damaged or incomplete.

    Add a problem for each such record.

    slots    the ring buffer, with one record in each slot
    counted  how many events the writer has counted
    """
    capacity, size = shape.ring_records, RECORD.size

    def record_in(slot: int) -> memoryview:
        return slots[slot * size : (slot + 1) * size]

    numbers = [_number(record_in(slot), slot, capacity) for slot in range(len(slots) // size)]
    newest = max(numbers, default=0)
    last = max(newest, counted)  # the newest event that the writer is known to have written completely
    torn = False
    for slot, number in enumerate(numbers):
        expected = last - (last - 1 - slot) % capacity  # the event that belongs in this slot; below 1: none yet
        at, record = shape.ring_at + slot * size, record_in(slot)
        if number == expected > 0 or (expected < 1 and record == _EMPTY):
            continue
        if slot == last % capacity and _may_be_torn(record, last + 1):
            torn = True
            problems.torn(at)
        elif expected < 1:
            problems.damage(at, "there are bytes after the last event")
        else:
            wrong = "is missing" if number or record == _EMPTY else "does not match its checksum"
            problems.damage(at, f"event {expected} {wrong}")
    slot_of = {number: slot for slot, number in enumerate(numbers) if number}
    oldest = newest
    while oldest - 1 in slot_of:
        oldest -= 1
    return Ring(b"".join(record_in(slot_of[n]) for n in range(oldest, newest + 1)) if newest else b"", torn)


def _may_be_torn(record: memoryview, number: int) -> bool:
    """Whether the record looks as if its writer died while it wrote event ``number``.

    The two recorders leave different incomplete records:

    - The recorder in Python clears the old record, and writes the checksum last. So the checksum is 0.
    - The recorder in C copies the new record over the old one. So the number can be that of the new event, while the
      checksum is still that of the old record, and therefore wrong.
    """
    event = Event._make(RECORD.unpack(record))
    return event.check == 0 or (event.n == number and not is_whole(record))


def _number(record: memoryview, slot: int, capacity: int) -> int:
    """Return the number of the event at the index ``slot`` of a ring buffer of ``capacity`` records.

    Return 0 if there is no intact event, or if the number of the event belongs to a different index.
    """
    if not is_whole(record):
        return 0
    event = Event._make(RECORD.unpack(record))
    return event.n if event.kind in _KINDS and (event.n - 1) % capacity == slot else 0
