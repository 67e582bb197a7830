"""Judge two dumps of each rank, taken at different times. A wait that ended in between was no deadlock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.members import groups_of, with_members
from repro.verdict.partial.dumps.moments import advanced
from repro.verdict.partial.dumps.waits import Wait, waits_of
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import call_in, ranks_of

LATE_S = 1.0
"""A rank is named if it queued an operation this many seconds later than the others. A smaller delay is normal."""


def judge_advance(job: JobRecords, waits: Sequence[Wait]) -> Diagnosis | None:
    """Judge a job whose ranks advanced between two dumps of each rank, so that the waits of the earlier dumps ended.

    A rank is late if it queued an operation LATE_S seconds or more after the ranks that waited for it in the earlier
    dumps. If there is a late rank, the verdict is `slow` and names it. Otherwise the verdict is `inconclusive`.

    Return None in each of these cases:

    - Fewer than two ranks advanced, or a rank that waits now did not advance.
    - A member has not queued an operation in which a rank waits now, or no dump shows whether it has.
    - No rank is late, all times are known, and no rank waits now.

    waits   the waits that the later dumps show
    """
    moved = [rank for rank, dump in job.earlier.items() if advanced(dump, job.recorders[rank])]
    waiting = {wait.rank for wait in waits}
    if len(moved) < 2 or not waiting <= set(moved) or any(wait.missing or wait.unseen for wait in waits):
        return None
    before = with_members(job.recorders | job.earlier)
    ended = [wait for wait in waits_of(groups_of(before), before) if wait.missing and wait.rank in moved]
    late: dict[int, tuple[Wait, float]] = {}
    times: dict[tuple[str, int], dict[int, float]] = {}
    are_known = True
    for wait, rank in [(each, rank) for each in ended for rank in each.missing if rank in moved]:
        key = wait.group.name, wait.call.seq or 0
        if key not in times:
            times[key] = _times_of(job, *key)
        by_s = _late_by(times[key], wait, rank)
        are_known &= by_s is not None
        if by_s is not None and by_s >= LATE_S:
            late[rank] = wait, by_s
    if not late:
        return _moving(job, moved, are_known) if waits or not are_known else None
    named = sorted(late)
    return Diagnosis(
        "slow", "straggler", tuple(named), (), "likely",
        (f"The wait in the earlier dumps has ended: {ranks_of(moved)} advanced. The others waited for "
         f"{ranks_of(named)}, which came late.",),
        tuple(f"Rank {rank} queued {call_in(wait.call, wait.group)} {by_s:.1f} s after the others, which waited in "
              f"this operation ({wait.at}, then {job.recorders[rank].source})"
              for rank, (wait, by_s) in sorted(late.items())),
        ("A third dump in which no rank has advanced since the second one.",),
        (f"the stacks of {ranks_of(named)} while the other ranks wait: py-spy dump --nonblocking --pid PID",
         "a third set of dumps, some seconds later"),
    )  # fmt: skip


def _moving(job: JobRecords, moved: Sequence[int], are_known: bool) -> Diagnosis:
    why = (
        "and all members have queued the operations in which they wait now: the later dumps may show a job that runs"
        if are_known
        else "and some entries have no times: nothing shows which rank came late"
    )
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (f"{ranks_of(moved).capitalize()} advanced between the two dumps, {why}.",),
        tuple(f"Rank {rank}: {job.earlier[rank].source}, then {job.recorders[rank].source}" for rank in moved[:6]),
        (), ("a third set of dumps, some seconds later", COLLECT["stacks"]),
    )  # fmt: skip


def _times_of(job: JobRecords, group: str, seq: int) -> dict[int, float]:
    """Return, for each rank, the time in seconds at which it queued the operation number ``seq`` of a group."""
    return {
        rank: times[seq]
        for rank, dump in job.recorders.items()
        for record in dump.groups
        if record.group.name == group and seq in (times := record.calls.times_by_number())
    }


def _late_by(times: Mapping[int, float], wait: Wait, rank: int) -> float | None:
    """Return how many seconds a rank queued an operation after the members that waited in it; None if unknown.

    The rank's time is compared with the median of the times at which these members queued the operation.

    times   rank -> when the rank queued the operation, in seconds
    wait    a wait in this operation, from the earlier dumps. All members waited, except those in ``wait.missing``
    """
    others = [at_s for member, at_s in times.items() if member not in wait.missing]
    return times[rank] - median(others) if rank in times and others else None
