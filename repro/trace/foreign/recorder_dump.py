"""A Flight Recorder dump: what one rank queued in each of its groups."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from repro.trace.foreign.operations import NOWHERE, Call, Calls, Group, Source
from repro.trace.knowledge import NOTHING, Knows


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group in a recorder dump: its `calls`, oldest first, and its counters from `pg_status`; None if they are
    absent.

    enqueued, completed   numbers of collectives and transfers together, as the backend counts them
    number                the group's id, which is the key in `pg_status`; a rank numbers its groups by it
    """

    group: Group
    calls: Calls
    enqueued: int | None = None
    completed: int | None = None
    number: str = ""

    @property
    def pending(self) -> Call | None:
        """Return the oldest operation that is not over."""
        place = self.calls.pending
        return None if place is None else self.calls[place]


@dataclass(frozen=True, slots=True)
class RecorderDump:
    """A Flight Recorder dump of one rank.

    configured  the groups that the rank belongs to; () if the dump does not list them
    order       the order in which the operations of all groups were queued: for each, its index into `groups`
    wrapped     whether older entries were overwritten, or may have been
    at_s        when the newest entry was queued; the dump itself was made then or later
    knows       the aspects of the rank that the entries show
    """

    rank: int
    groups: tuple[GroupRecord, ...]
    order: array[int] = field(default_factory=lambda: array("H"))
    configured: tuple[Group, ...] = ()
    backend: str = ""
    library: str = ""
    wrapped: bool = False
    at_s: float | None = None
    source: Source = NOWHERE
    knows: Knows = NOTHING

    def newest(self, most: int) -> list[tuple[GroupRecord, int]]:
        """Return the newest operations of all groups, oldest first, as (record of the group, index into its calls)."""
        places = [len(record.calls) for record in self.groups]
        operations = []
        for index in reversed(self.order[-most:]):
            places[index] -= 1
            operations.append((self.groups[index], places[index]))
        return operations[::-1]
