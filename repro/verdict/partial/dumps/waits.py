"""Who waits in which operation, for which ranks, by the dumps of the recorder; and a cycle of such waits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from repro.trace.observed import Call, Group, GroupRecord, RecorderDump


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank's oldest unfinished operation in one group, and the members that have not queued it."""

    rank: int
    group: Group
    call: Call
    missing: tuple[int, ...]
    unseen: tuple[int, ...]  # members without a dump
    at: str


def waits_of(groups: Mapping[Group, Mapping[int, GroupRecord]], dumps: Mapping[int, RecorderDump]) -> list[Wait]:
    """The oldest unfinished operation of each rank in each group, and the members that have not queued it.

    A member whose dump is whole and holds nothing of the group has queued nothing in it. Of one whose older entries
    were overwritten that is not known, and it counts as unseen.
    """
    waits = []
    wrapped = any(dump.wrapped for dump in dumps.values())
    for group, records in groups.items():
        queued = {member: 0 for member in group.members if member in dumps and not dumps[member].wrapped}
        queued.update({rank: last_queued(record) for rank, record in records.items()})
        unseen = tuple(member for member in group.members if member not in queued)
        for rank, record in sorted(records.items()):
            pending = record.pending
            if not pending:
                continue
            call = pending[0]
            if call.is_transfer:
                missing = _transfer_missing(rank, call, record, records, wrapped)
            elif call.seq is None:
                missing = ()
            else:
                missing = tuple(m for m in group.members if queued.get(m, call.seq) < call.seq)
            shown = replace(group, description=record.group.description)
            waits.append(Wait(rank, shown, call, missing, unseen, str(call.source)))
    return waits


def last_queued(record: GroupRecord) -> int:
    """The number of the last collective that a rank queued in a group, by its entries or by its counter."""
    numbers = [call.seq for call in record.calls if call.seq is not None]
    return max([*numbers, record.enqueued or 0 if not has_transfers(record) else 0], default=0)


def has_transfers(record: GroupRecord) -> bool:
    return any(call.is_transfer for call in record.calls)


def _transfer_missing(
    rank: int, call: Call, record: GroupRecord, records: Mapping[int, GroupRecord], wrapped: bool
) -> tuple[int, ...]:
    """The other end, if it has queued fewer matching operations: the k-th send meets the k-th receive. Of a ring that
    was overwritten the counts are not known; then an end is missing if it has no matching operation unfinished.
    """
    if call.peer is None or call.peer not in records:
        return ()
    op = "send" if call.op == "recv" else "recv"
    theirs = [c for c in records[call.peer].calls if c.op == op and c.peer == rank]
    if wrapped:
        return () if any(not c.done for c in theirs) else (call.peer,)
    mine = [c for c in record.calls[: record.calls.index(call) + 1] if c.op == call.op and c.peer == call.peer]
    return (call.peer,) if len(theirs) < len(mine) else ()


def find_cycle(waits: Sequence[Wait]) -> list[Wait]:
    """Waits that lead from a rank over missing ranks back to it; [] where there is none."""
    by_rank: dict[int, list[Wait]] = {}
    for wait in waits:
        by_rank.setdefault(wait.rank, []).append(wait)
    done: set[int] = set()
    for root in by_rank:
        path: list[Wait] = []
        cycle = _walk(root, by_rank, path, [], done)
        if cycle:
            return cycle
    return []


def _walk(
    rank: int, by_rank: Mapping[int, list[Wait]], path: list[Wait], on_path: list[int], done: set[int]
) -> list[Wait]:
    """Depth-first search with an explicit stack; chains of a thousand ranks are met."""
    stack: list[tuple[int, list[tuple[Wait, int]]]] = [(rank, _steps(rank, by_rank))]
    on_path.append(rank)
    while stack:
        here, steps = stack[-1]
        if not steps:
            stack.pop()
            done.add(here)
            on_path.pop()
            if path:
                path.pop()
            continue
        wait, following = steps.pop()
        if following in on_path:
            return [*path, wait][on_path.index(following) :]
        if following in by_rank and following not in done:
            path.append(wait)
            on_path.append(following)
            stack.append((following, _steps(following, by_rank)))
    return []


def _steps(rank: int, by_rank: Mapping[int, list[Wait]]) -> list[tuple[Wait, int]]:
    return [(wait, other) for wait in reversed(by_rank[rank]) for other in reversed(wait.missing)]
