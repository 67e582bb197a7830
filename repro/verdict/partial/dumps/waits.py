"""Find from Flight Recorder dumps which ranks wait for which, in which operation, and a cycle of such waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from repro.trace.foreign.records import Call, Group, GroupRecord, RecorderDump
from repro.verdict.cycle import find_cycle


@dataclass(frozen=True, slots=True)
class Wait:
    """The oldest unfinished operation of one rank in one group, and the members that have not queued it.

    call      the operation
    missing   members whose dump shows that they have not queued it
    unseen    members for which no dump shows whether they have queued it
    at        where the dump has the operation, as text: the name of the file and the number of the entry
    """

    rank: int
    group: Group
    call: Call
    missing: tuple[int, ...]
    unseen: tuple[int, ...]
    at: str


def waits_of(groups: Mapping[Group, Mapping[int, GroupRecord]], dumps: Mapping[int, RecorderDump]) -> list[Wait]:
    """Return the waits of all ranks.

    In each group, a rank can have two waits: in its oldest unfinished collective, and in its oldest unfinished send or
    receive.

    If a member's dump has no entries of a group, the member counts as missing, because it has queued nothing in this
    group. But if the oldest entries of this dump were overwritten, they were possibly of this group. Then the member
    counts as unseen.

    groups   for each group, a dict from rank to what the rank recorded in the group
    dumps    rank -> the rank's dump
    """
    waits = []
    wrapped = any(dump.wrapped for dump in dumps.values())
    for group, records in groups.items():
        queued = {member: 0 for member in group.members if member in dumps and not dumps[member].wrapped}
        queued.update({rank: last_queued(record) for rank, record in records.items()})
        unseen = tuple(member for member in group.members if member not in queued)
        behind: dict[int, tuple[int, ...]] = {}  # sequence number -> the members that have not queued it
        for rank, record in sorted(records.items()):
            shown = replace(group, description=record.group.description)
            for place in record.calls.unfinished():
                call = record.calls[place]
                if call.is_transfer:
                    missing = _transfer_missing(rank, place, record, records, wrapped)
                elif call.seq is None:
                    missing = ()
                else:
                    if call.seq not in behind:
                        behind[call.seq] = tuple(m for m in group.members if queued.get(m, call.seq) < call.seq)
                    missing = behind[call.seq]
                waits.append(Wait(rank, shown, call, missing, unseen, str(call.source)))
    return waits


def last_queued(record: GroupRecord) -> int:
    """Return the sequence number of the last collective that a rank queued in a group.

    It is the higher of two numbers: the last one in the entries of the dump, and the dump's counter of queued
    operations. The counter is not used if the group has sends or receives, because it counts them, too.
    """
    counted = 0 if record.calls.has_transfers else record.enqueued or 0
    return max(record.calls.last_number() or 0, counted)


def _transfer_missing(
    rank: int, place: int, record: GroupRecord, records: Mapping[int, GroupRecord], wrapped: bool
) -> tuple[int, ...]:
    """Return (peer,) if the peer of a send or receive has not queued the matching operation; otherwise ().

    Also return () if the peer is not known, or recorded nothing in this group.

    The k-th send of a rank to its peer matches the k-th receive of the peer from this rank, so both are counted. If
    ``wrapped``, counting is not possible. Then any unfinished operation of the peer in the opposite direction counts as
    the matching one.

    place     the index of the send or receive in ``record.calls``
    record    what the rank queued in the group; ``records`` has this for each member whose dump has the group
    wrapped   whether older entries were overwritten in at least one dump of the job
    """
    call = record.calls[place]
    if call.peer is None or call.peer not in records:
        return ()
    theirs = records[call.peer].calls
    matching = theirs.transfers("send" if call.op == "recv" else "recv", rank)
    if wrapped:
        return () if any(not theirs.done[i] for i in matching) else (call.peer,)
    mine = sum(i <= place for i in record.calls.transfers(call.op, call.peer))
    return (call.peer,) if len(matching) < mine else ()


def cycle_of(waits: Sequence[Wait]) -> list[Wait]:
    """Return waits that form a cycle: each is a wait for the rank of the next wait. [] if there is no cycle."""
    by_rank: dict[int, list[Wait]] = {}
    for wait in waits:
        by_rank.setdefault(wait.rank, []).append(wait)
    cycle = find_cycle({rank: {m for wait in rows for m in wait.missing} for rank, rows in by_rank.items()})
    links = zip(cycle, [*cycle[1:], *cycle[:1]], strict=True)
    return [next(wait for wait in by_rank[rank] if awaited in wait.missing) for rank, awaited in links]
