"""Parse the group slots of a witness: 128 bytes for each group, with its name, members, last issue, last completion."""

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
    left     the highest sequence number of a collective that is complete on this rank; 0 if there is none
    last     the event that records the collective issued last; None if there is none, or if it cannot be read
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
    """Return how far the rank has come in each group, from the 128 bytes (slot) that the witness has for each group.

    The index in the result is the index of the group in the file. Damaged slots are reported to ``problems``.

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
    """The 128 bytes of a witness that describe the progress in one group.

    at      offset of these bytes in the file
    index   index of the group in the file
    """

    data: bytes
    at: int
    index: int
    problems: Problems

    def trace(
        self, strings: list[str], ring: Ring, issued: Event | None, left: Event | None, counted: int
    ) -> GroupTrace:
        """Return how far the rank has come in this group, from the group's 128 bytes and from the newest events.

        The events are needed, because the writer stores an event before it updates the 128 bytes.

        ring      the newest events
        issued    the newest event that issues a collective of this group; None if ``ring`` has none
        left      the newest event that says that a collective of this group is complete; None if ``ring`` has none
        counted   how many events the rank had recorded completely, according to the counter in the file
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
        """Return the highest sequence number of a collective of this group that is complete on this rank.

        It is the higher of two numbers: the one in the group's 128 bytes of the file, and the one of ``left``.

        left     the newest event that says that a collective of this group is complete, or None
        counted  how many events the rank had recorded completely. If ``left`` is one of them, but the 128 bytes have a
                 lower number, they are damaged
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
        """Return the event that issued the group's last collective. The group's 128 bytes have a copy of this event.

        Return None if the copy is damaged or empty.

        ring     the newest events
        issued   the newest event in ``ring`` that issues a collective of this group, or None
        counted  how many events the rank had recorded completely. If ``issued`` is one of them, but the copy is of an
                 older event, the copy is damaged
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
        """Whether ``event``, which was read from this group's 128 bytes, issues a collective of this group.

        False also if ``ring``, which has the newest events, has a different event with the same number.
        """
        if event.kind not in (Kind.ENTER, Kind.ISSUE) or event.group != self.index or not event.seq:
            return False
        if ring.last is None or not ring.first <= event.n <= ring.last.n:
            return True
        return ring.event(event.n - ring.first) == event


def _newest_calls(ring: Ring) -> dict[int, tuple[Event | None, Event | None]]:
    """Return two events for each group index: the last issue of a collective, and the last completion.

    The last completion is the one with the highest sequence number. Only the newest _RECENT events of ``ring`` are
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
