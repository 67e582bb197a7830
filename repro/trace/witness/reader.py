"""Parse the witness file of one rank into a `Witness`, which looks up the strings and sizes of events.

Parts of the file that do not match their checksums are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from repro.trace.knowledge import Knows
from repro.trace.witness.format import ENTRY_SEPARATOR, GROUPS_AT, RECORD, SEPARATOR, Event, Geometry, Identity, column
from repro.trace.witness.group_slots import GroupTrace, parse_groups
from repro.trace.witness.parse import (
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
    """The fields of a collective that must be equal on all ranks that take part. Sizes and root are not among them."""

    group: str
    op: str
    layer: str
    dtype: str
    reduce_op: str


@dataclass(frozen=True, slots=True)
class Witness:
    """The events that one rank recorded, and how far it has come in each group.

    name         the name of the file, for messages
    writer       the process that wrote the file, from the header
    strings      the texts to which events refer by their index in this list, such as layers and call sites
    groups       how far the rank has come in each group
    ring         the readable events, packed
    last         the newest readable event
    num_events   number of the newest readable event; events are counted from 1, so overwritten events count, too
    first_event  number of the oldest readable event; if it is above 1, older events were overwritten
    complete     False if the file is damaged, its last record is incomplete, or the members of a group are unknown
    damaged      whether some bytes do not match their checksums, so that no certain conclusion is possible
    heartbeat    the name of the last heartbeat (a sign of life that is no event); heartbeat_ns is its time
    problems     a line for each problem of the file: "rank003.wit:38912: damage: …"
    vectors      a dict from (offset, number of sizes) to the packed sizes of a collective, for collectives with more
                 than one size
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

    @property
    def knows(self) -> Knows:
        return self.writer.knows

    def last_event_ns(self) -> int:
        """Return the time of the last event, heartbeats excluded, in ns of the rank's monotonic clock; 0 if none."""
        return self.last.t_ns if self.last else 0

    def line(self, n: int) -> str:
        """Return the place of event ``n``: "rank003.wit:38912 event 118"."""
        at = self.shape.ring_at + (n - 1) % self.shape.ring_records * RECORD.size
        return f"{self.name.rpartition('/')[2]}:{at} event {n}"

    @property
    def has_free_slots(self) -> bool:
        """Whether the file has room for the progress of one more group. Then it has the progress of each used group."""
        return len(self.groups) < self.shape.group_slots

    def last_kinds(self) -> dict[tuple[tuple[str, tuple[int, ...]], int], int]:
        """Return, for each collective, the kind of its newest event, which says if it was issued, awaited or completed.

        The key of a collective is ((group name, members), sequence number).
        """
        keys = [(group.name, group.members) for group in self.groups]
        kinds = {(key, each.last.seq): each.last.kind for key, each in zip(keys, self.groups, strict=True) if each.last}
        by_place: dict[tuple[int, int], int] = {}
        for place, number, kind in zip(*map(self.column, ("group", "seq", "kind")), strict=True):
            by_place[place, number] = kind
        return kinds | {
            (keys[place], seq): kind for (place, seq), kind in by_place.items() if place < len(keys) and seq
        }

    def events(self, newest: int | None = None) -> Iterator[Event]:
        """Yield the readable events, oldest first: all, or only the last ``newest`` ones."""
        return self.ring.events(newest)

    def event(self, index: int) -> Event:
        """Return the readable event at an index; 0 is the oldest."""
        return self.ring.event(index)

    def column(self, field: str) -> list[int]:
        """Return the values of one field in all readable events, oldest first."""
        return column(self.ring.records, field)

    def text(self, string: int) -> str:
        """Return the string whose number is ``string``; "?" if the string is not readable."""
        return self.strings[string] if string < len(self.strings) else "?"

    def signature(self, sig: int) -> Signature:
        """Return the fields of a collective that must be equal on all ranks.

        sig: the field ``sig`` of an event of this collective
        """
        signature = self._signatures.get(sig)
        if signature is None:
            signature = self._signatures[sig] = _signature(self.text(sig))
        return signature

    def schedule(self, sig: int) -> tuple[tuple[str, str, str], ...]:
        """Return the schedule that the rank declared for a step: (group, op, layer) of each entry.

        sig: the field ``sig`` of the event with which the step begins
        """
        return _schedule(self.text(sig))

    def sizes(self, vector: int, num_sizes: int) -> tuple[int, ...]:
        """Return the sizes of an event's collective, in rows or elements; () if they cannot be read.

        vector, num_sizes: the fields of the event with these names
        """
        if num_sizes <= 1:
            return (vector,) * num_sizes
        words = self.vectors.get((vector, num_sizes))
        return () if words is None else _sizes(words)


# All ranks record the same texts, so each text is parsed once for all ranks.


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
    """Parse everything that is readable in a witness file. Raises WitnessError if the header is not usable.

    name   the name of the file for messages
    """
    writer, shape = parse_header(data, name)
    problems = Problems(name)
    if len(data) < shape.file_bytes:
        problems.damage(len(data), f"the file ends early: its header says {shape.file_bytes} bytes")
        data = data.ljust(GROUPS_AT, b"\0")
    live = parse_live(data, problems)
    strings = parse_strings(data, shape, live.strings, problems)
    ring = parse_ring(data, shape, live.events, problems)
    groups = parse_groups(data, shape, strings, ring, live, problems)
    named = vectors_named(ring.records, [group.last for group in groups if group.last is not None])
    vectors = parse_vectors(data, shape, live.vector_words, named, problems)
    beat_ns, beat = parse_heartbeat(data, problems)
    followed = all(group.members for group in groups)  # without its members, a group cannot be compared across ranks
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
