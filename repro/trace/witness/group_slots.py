"""Parse the slot that a witness file has for each group: name, members, last issue, last completion."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

from repro.trace.witness.format import (
    CRC,
    GROUP_BYTES,
    GROUP_LEFT,
    GROUP_NAME,
    GROUPS_AT,
    LAST_AT,
    LEFT_AT,
    RECORD,
    Event,
    Geometry,
    Kind,
    is_whole,
    unguarded,
)
from repro.trace.witness.parse import Live, Problems, Ring

_RECENT = 16  # how many of the newest events are searched for one that a slot lacks; usually it lacks none or one
_MAX_MEMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class GroupTrace:
    """How far one rank has come in one group.

    members  global ranks in group order; () if they are not known
    issued   sequence number of the collective that the rank issued last; 0 if there is none
    left     the highest sequence number of a completed collective; 0 if there is none
    last     the event that records the collective issued last
    """

    name: str
    members: tuple[int, ...]
    issued: int
    left: int
    last: Event | None

    @property
    def hash(self) -> int:
        """Return the rolling hash over all collectives that the rank has issued in the group; 0 if there are none."""
        return self.last.hash if self.last else 0


def parse_groups(
    data: bytes, shape: Geometry, strings: list[str], ring: Ring, live: Live, problems: Problems
) -> tuple[GroupTrace, ...]:
    """Return the progress of the rank in each group, by group index. Damaged slots are reported to ``problems``.

    ring   the newest events; they can be newer than those in the slots
    live   the writer's counters. A slot that lacks an event which the writer has counted is damaged
    """
    newest = _newest_calls(ring)
    traces: list[GroupTrace] = []
    for index in range(max(0, min(shape.group_slots, (len(data) - GROUPS_AT) // GROUP_BYTES))):
        at = GROUPS_AT + index * GROUP_BYTES
        slot = data[at : at + GROUP_BYTES]
        if not any(slot):
            break
        issued, left = newest.get(index, (None, None))
        traces.append(_Slot(slot, at, index, problems).trace(strings, ring, issued, left, live.events or 0))
    if live.groups is not None and live.groups > len(traces) and len(data) >= shape.file_bytes:
        problems.damage(GROUPS_AT + len(traces) * GROUP_BYTES, f"group {len(traces)} of {live.groups} is missing")
    return tuple(traces)


@dataclass(frozen=True, slots=True)
class _Slot:
    """The bytes of one group's slot and their offset in the file."""

    data: bytes
    at: int
    index: int
    problems: Problems

    def trace(
        self, strings: list[str], ring: Ring, issued: Event | None, left: Event | None, counted: int
    ) -> GroupTrace:
        """Combine the slot with the newest events in the ring, because the writer updates the ring before the slot.

        issued    the newest event in the ring that issues a collective of this group
        left      the newest event in the ring that completes a collective of this group
        counted   how many events the writer has counted (the first counter of the area LIVE)
        """
        name, members = self._names(strings)
        left_seq = self._left(left, counted)
        last = self._last(ring, issued, counted)
        if issued is not None and (last is None or last.n < issued.n):
            last = issued
        issued_seq = last.seq if last else 0
        if left_seq > issued_seq:
            self.problems.damage(
                self.at + LEFT_AT, f"#{left_seq} of group {self.index} completed, but was never issued"
            )
        return GroupTrace(name, members, issued_seq, min(left_seq, issued_seq), last)

    def _names(self, strings: list[str]) -> tuple[str, tuple[int, ...]]:
        name, members, check = GROUP_NAME.unpack_from(self.data)
        if check != zlib.crc32(self.data[: GROUP_NAME.size - CRC.size]):
            self.problems.damage(self.at, f"the name of group {self.index} does not match its checksum")
            return "?", ()
        if max(name, members) >= len(strings):  # the string area was full, or is damaged
            return strings[name] if name < len(strings) else "?", ()
        return strings[name], _members(strings[members])

    def _left(self, left: Event | None, counted: int) -> int:
        """Return the sequence number of the last completed collective: the higher of the numbers in slot and ring.

        left     the newest event in the ring that completes a collective of this group
        counted  how many events the writer has counted
        """
        in_slot = unguarded(GROUP_LEFT.unpack_from(self.data, LEFT_AT)[0])
        in_ring = left.seq if left is not None else 0
        if in_slot is None:
            self.problems.damage(
                self.at + LEFT_AT, f"the last completion of group {self.index} does not match its checksum"
            )
        elif left is not None and left.n <= counted and in_slot < in_ring:
            self.problems.damage(self.at + LEFT_AT, f"group {self.index} lacks the completion of #{in_ring}")
        return max(in_slot or 0, in_ring)

    def _last(self, ring: Ring, issued: Event | None, counted: int) -> Event | None:
        """Return the slot's copy of the event that issued the group's last collective; None if it is damaged or empty.

        ring     the newest events
        issued   the newest event in the ring that issues a collective of this group
        counted  how many events the writer has counted. The writer updates the slot before it counts the event, so a
                 slot that lacks a counted event is damaged
        """
        record = self.data[LAST_AT : LAST_AT + RECORD.size]
        event = Event._make(RECORD.unpack(record)) if is_whole(record) else None
        wrong = ""
        if event is None:
            if any(record) and (issued is None or issued.n <= counted):
                wrong = f"the last record of group {self.index} does not match its checksum"
        elif not self._may_hold(event, ring):
            wrong = f"the slot of group {self.index} has the record of another event"
            event = None
        if not wrong and issued is not None and issued.n <= counted and (event is None or event.n < issued.n):
            wrong = f"group {self.index} lacks event {issued.n}, which issued its last collective"
        if wrong:
            self.problems.damage(self.at + LAST_AT, wrong)
        return event

    def _may_hold(self, event: Event, ring: Ring) -> bool:
        """Whether ``event``, which was read from this slot, can belong there.

        It can if it issues a collective of this group, and the ring has no different event with the same number.
        """
        if event.kind not in (Kind.ENTER, Kind.ISSUE) or event.group != self.index or not event.seq:
            return False
        if ring.last is None or not ring.first <= event.n <= ring.last.n:
            return True
        return ring.event(event.n - ring.first) == event


def _newest_calls(ring: Ring) -> dict[int, tuple[Event | None, Event | None]]:
    """Return, for each group index, the newest event that issues a collective, and one that completes a collective.

    The second event is the completion of the highest sequence number. Only the newest _RECENT events of the ring are
    searched; None stands for an event that is not among them.
    """
    newest: dict[int, tuple[Event | None, Event | None]] = {}
    for event in ring.events(_RECENT):
        issued, left = newest.get(event.group, (None, None))
        if event.kind in (Kind.ENTER, Kind.ISSUE):
            newest[event.group] = event, left
        elif event.kind == Kind.LEAVE and (left is None or left.seq < event.seq):
            newest[event.group] = issued, event
    return newest


@lru_cache(maxsize=4096)  # all ranks of a group write the same list of members
def _members(text: str) -> tuple[int, ...]:
    if text.count(",") >= _MAX_MEMBERS:
        return ()
    try:
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        return ()
