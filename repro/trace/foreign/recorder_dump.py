"""A Flight Recorder dump: what one rank queued in each of its groups."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from repro.trace.foreign.operations import NOWHERE, Call, Calls, Group, Source
from repro.trace.knowledge import NOTHING, Knows


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """One group in a Flight Recorder dump.

    calls                 the operations that the rank queued in the group, oldest first
    enqueued, completed   how many operations (with sends and receives) the rank has queued and completed in the group,
                          from the dump's table `pg_status`; None if the dump does not have this table
    number                the id that this rank gave to the group: its key in `pg_status`
    """

    group: Group
    calls: Calls
    enqueued: int | None = None
    completed: int | None = None
    number: str = ""

    @property
    def pending(self) -> Call | None:
        """Return the oldest operation that is not complete; None if all are complete."""
        place = self.calls.pending
        return None if place is None else self.calls[place]


@dataclass(frozen=True, slots=True)
class RecorderDump:
    """A Flight Recorder dump of one rank.

    groups      the groups in which the rank queued operations, also groups whose operations are overwritten
    order       for each operation of all groups, oldest first: the index of its group in `groups`
    configured  all groups that the rank belongs to; () if the dump does not list them
    backend     the backend of the oldest entry, such as "nccl" or "gloo"; "" if the entries name none
    library     the version of NCCL or of another communication library; "" if the dump does not give it
    wrapped     whether older entries were overwritten; also True if this is not known
    at_s        when the newest entry was queued, in seconds since the start (in UTC) of the year of the oldest entry;
                the dump was made at this time or later. None if the entries have no times
    knows       what the entries show about the rank, for example the order of its collectives
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
        """Return the ``most`` newest operations of all groups together, oldest first.

        Each operation is (record of its group, index into the calls of this record).
        """
        places = [len(record.calls) for record in self.groups]
        operations = []
        for index in reversed(self.order[-most:]):
            places[index] -= 1
            operations.append((self.groups[index], places[index]))
        return operations[::-1]
