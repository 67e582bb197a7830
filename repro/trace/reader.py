"""One rank's witness as a value: what its bytes say, with ids resolved, and nothing that does not match its check."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from repro.trace.format import ENTRY_SEPARATOR, GROUPS_AT, RECORD, SEPARATOR, Event, Geometry, Identity, column
from repro.trace.group_slots import GroupTrace, parse_groups
from repro.trace.parse import (
    Problems,
    Ring,
    parse_header,
    parse_heartbeat,
    parse_live,
    parse_ring,
    parse_strings,
    parse_vectors,
    vectors_named,
)


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
    writer: Identity
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
        return self.writer.rank

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

    def last_kinds(self) -> dict[tuple[tuple[str, tuple[int, ...]], int], int]:
        """What the rank last recorded about each collective, as far as the ring goes: (group, number) -> kind."""
        keys = [(group.name, group.members) for group in self.groups]
        kinds = {(key, each.last.seq): each.last.kind for key, each in zip(keys, self.groups, strict=True) if each.last}
        by_place: dict[tuple[int, int], int] = {}
        for place, number, kind in zip(*map(self.column, ("group", "seq", "kind")), strict=True):
            by_place[place, number] = kind
        return kinds | {
            (keys[place], seq): kind for (place, seq), kind in by_place.items() if place < len(keys) and seq
        }

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
    writer, shape = parse_header(data, name)
    problems = Problems(name)
    if len(data) < shape.file_bytes:
        problems.damage(len(data), f"the file ends early, {shape.file_bytes} bytes were laid out")
        data = data.ljust(GROUPS_AT, b"\0")
    live = parse_live(data, problems)
    strings = parse_strings(data, shape, live.strings, problems)
    ring = parse_ring(data, shape, live.events, problems)
    groups = parse_groups(data, shape, strings, ring, live, problems)
    named = vectors_named(ring.records, [group.last for group in groups if group.last is not None])
    vectors = parse_vectors(data, shape, live.vector_words, named, problems)
    beat_ns, beat = parse_heartbeat(data, problems)
    followed = all(group.members for group in groups)  # else what the rank did there cannot be set against its peers
    last = ring.last
    return Witness(
        name,
        writer,
        strings,
        groups,
        ring,
        last,
        num_events=last.n if last else 0,
        first_event=ring.first,
        complete=followed and not ring.torn and not problems.damaged,
        damaged=problems.damaged,
        heartbeat_ns=beat_ns,
        heartbeat=strings[beat] if beat < len(strings) else "?",
        problems=problems.lines(),
        vectors=vectors,
        shape=shape,
    )
