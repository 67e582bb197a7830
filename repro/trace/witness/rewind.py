"""Rebuild the state that a witness had at an earlier moment, to judge a run again as it was at that moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from repro.trace.witness.format import RECORD, Event, Kind
from repro.trace.witness.group_slots import GroupTrace
from repro.trace.witness.parse import Ring
from repro.trace.witness.reader import Witness

_ISSUES = (Kind.ENTER, Kind.ISSUE)


def rewind(witness: Witness, num_events: int, heartbeat_ns: int) -> Witness | None:
    """Return the witness as it was when its rank had recorded ``num_events`` events.

    heartbeat_ns   the time of the last heartbeat before that moment. The caller must know it, because the witness has
                   only the time of the newest heartbeat

    Returns None if the witness has fewer events, or if an event that shows the state at that moment is overwritten.
    """
    witness = dataclasses.replace(witness, heartbeat_ns=heartbeat_ns)
    if witness.num_events == num_events:
        return witness
    num_kept = num_events - witness.first_event + 1
    if witness.num_events < num_events or num_kept < 1:
        return None
    ring = Ring(witness.ring.records[: num_kept * RECORD.size])
    kept, later = list(ring.events()), list(witness.events())[num_kept:]
    groups = []
    for index, group in enumerate(witness.groups):
        trace = _rewind_group(group, [e for e in kept if e.group == index], [e for e in later if e.group == index])
        if trace is None:
            return None
        groups.append(trace)
    return dataclasses.replace(
        witness,
        groups=tuple(groups),
        ring=ring,
        last=ring.last,
        num_events=num_events,
        complete=not witness.damaged and all(group.members for group in groups),
    )


def _rewind_group(group: GroupTrace, kept: Sequence[Event], later: Sequence[Event]) -> GroupTrace | None:
    """Return how far the rank had come in a group at an earlier moment.

    group         how far it came in the end
    kept, later   the group's events before and after that moment

    Returns None if the event that issued the last collective before that moment is overwritten.
    """
    last, issued, left = group.last, group.issued, group.left
    if first := next((event for event in later if event.kind in _ISSUES), None):
        issued = first.seq - 1
        last = next((event for event in reversed(kept) if event.kind in _ISSUES), None)
        if issued and last is None:
            return None
    if completed := [event.seq for event in later if event.kind == Kind.LEAVE]:
        before = [event.seq for event in kept if event.kind == Kind.LEAVE]
        # Assume that a collective whose events were overwritten had completed, unless a later event shows otherwise.
        open_calls = [event.seq for event in kept if event.kind in _ISSUES]
        left = max(before) if before else min(issued, *(seq - 1 for seq in (*completed, *open_calls)))
    return dataclasses.replace(group, last=last, issued=issued, left=left)
