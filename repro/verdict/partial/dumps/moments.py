"""Sort the Flight Recorder dumps of each rank by time, and find the dumps that are not usable.

A dump is not usable if it is older than the dumps of other ranks, if its file name has a wrong rank, or if the dumps
with the same rank in their names are of several processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from repro.trace.foreign.operations import Form
from repro.trace.foreign.records import Group, GroupRecord, RecorderDump
from repro.verdict.partial.dumps.waits import last_queued
from repro.verdict.partial.words import ranks_of, verb

NEEDS_ALL = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier")
"""Operations that a member can complete only after every member has queued them."""
SAME_ENTRY_S = 1e-3


@dataclass(slots=True)
class Moments:
    """The usable dumps of a job, sorted by time.

    last      rank -> its newest dump
    earlier   rank -> its oldest dump, if it was taken earlier than the newest one
    equal     ranks with two equal dumps: either the rank did not advance, or one dump is a copy of the other
    remarks   which dumps were left out and why, in sentences
    """

    last: dict[int, RecorderDump] = field(default_factory=dict)
    earlier: dict[int, RecorderDump] = field(default_factory=dict)
    equal: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def moments_of(dumps: Iterable[RecorderDump]) -> Moments:
    """Sort dumps by rank and time.

    A dump is left out if its groups do not contain the rank in its file name. All dumps of a rank are left out if they
    are of different processes.
    """
    moments = Moments()
    by_rank: dict[int, list[RecorderDump]] = {}
    for dump in dumps:
        if _belongs(dump):
            by_rank.setdefault(dump.rank, []).append(dump)
        else:
            moments.remarks.append(
                f"The name of {dump.source} says rank {dump.rank}, but its groups do not contain rank {dump.rank}. The "
                "dump is not used: rename the file to …_rank_N, with the global rank N."
            )
    for rank, rows in sorted(by_rank.items()):
        ordered = sorted(rows, key=_age)
        strange = next((dump for dump in ordered[:-1] if not _same_process(dump, ordered[-1])), None)
        if strange is not None:
            moments.remarks.append(
                f"{strange.source} and {ordered[-1].source} are both named rank {rank} but are of different processes "
                "(another job, another run, or a local rank in the name). Neither is used."
            )
            continue
        newest = [dump for dump in ordered if _same_moment(dump, ordered[-1])]
        moments.last[rank] = max(newest, key=_detail)
        older = [dump for dump in ordered if not _same_moment(dump, ordered[-1])]
        if older:
            moments.earlier[rank] = older[0]
        elif len(newest) > 1:
            moments.equal.append(rank)
    return moments


def world_sizes(dumps: Iterable[RecorderDump]) -> dict[int, list[int]]:
    """Return, for each size of the default group, the ranks whose dumps have this size.

    If there are several sizes, the dumps are of several jobs.
    """
    sizes: dict[int, list[int]] = {}
    for dump in dumps:
        for group in dump.configured:
            if group.members and (group.description == "default_pg" or group.name == "0"):
                sizes.setdefault(len(group.members), []).append(dump.rank)
                break
    return sizes


def stale_dumps(groups: Mapping[Group, Mapping[int, GroupRecord]]) -> dict[int, str]:
    """Return, for each rank whose dump is older than the dumps of other ranks, a sentence that shows this.

    A dump is older if it ends before an operation that another member of the group has completed. Only the operations
    in NEEDS_ALL show this: no member can complete them before all members have queued them.

    groups   for each group, a dict from rank to what the rank recorded in the group
    """
    stale: dict[int, str] = {}
    for group, records in groups.items():
        finished = [(number, rank) for rank, row in records.items()
                    if (number := row.calls.last_number(done=True, where=_needs_all)) is not None]  # fmt: skip
        if not finished:
            continue
        number, witness = max(finished)
        for rank, record in records.items():
            if last_queued(record) < number and rank not in stale:
                stale[rank] = (
                    f"rank {witness} completed #{number} of {group}, which needs rank {rank}, but the dump of rank "
                    f"{rank} ends at #{last_queued(record)}"
                )
    return stale


def _needs_all(form: Form) -> bool:
    return form.op in NEEDS_ALL


def describe_stale(stale: Mapping[int, str], dumps: Mapping[int, RecorderDump]) -> list[str]:
    newest = max((dump.at_s for dump in dumps.values() if dump.at_s is not None), default=None)
    lines = []
    for rank, why in list(stale.items())[:3]:
        at_s = dumps[rank].at_s
        age = f" by at least {newest - at_s:.0f} s" if newest is not None and at_s is not None else ""
        lines.append(
            f"The dump of rank {rank} is stale, older than the others{age}: {why} ({dumps[rank].source}). "
            "It is not used."
        )
    if len(stale) > len(lines):
        lines.append(f"{len(stale) - len(lines)} more dumps are stale: {ranks_of(stale)}.")
    return lines


def describe_equal(ranks: Sequence[int]) -> str:
    return (
        f"The two dumps of {ranks_of(ranks)} are equal: if they are of different moments, "
        f"{verb(ranks, 'this rank', 'these ranks')} did not advance between them."
    )


def advanced(before: RecorderDump, after: RecorderDump) -> bool:
    """Whether a rank queued or completed an operation between two of its dumps."""
    old, new = _positions(before), _positions(after)
    return any(new[key] > old[key] for key in old.keys() & new.keys()) or bool(new.keys() - old.keys())


def _belongs(dump: RecorderDump) -> bool:
    return all(dump.rank in group.members for group in dump.configured if group.members)


def _age(dump: RecorderDump) -> tuple[float, int]:
    return dump.at_s or 0.0, sum(done for _, done in _positions(dump).values())


def _detail(dump: RecorderDump) -> tuple[int, int]:
    framed = sum(bool(record.calls and record.calls[-1].frames) for record in dump.groups)
    return framed, sum(len(record.calls) for record in dump.groups)


def _positions(dump: RecorderDump) -> dict[str, tuple[int, int]]:
    """Return a dict from the name of a group to (number of the last queued, of the last completed collective) in it.

    Return only groups of which the dump has entries. The second number is 0 if no collective has completed.
    """
    result = {}
    for record in dump.groups:
        queued = record.calls.last_number()
        if queued is not None:
            result[record.group.name] = (queued, record.calls.last_number(done=True) or 0)
    return result


def _same_moment(one: RecorderDump, two: RecorderDump) -> bool:
    a, b = _positions(one), _positions(two)
    return one.at_s == two.at_s and all(a[key] == b[key] for key in a.keys() & b.keys())


def _same_process(before: RecorderDump, after: RecorderDump) -> bool:
    """Whether two dumps can be of the same process.

    They can if each entry that is in both dumps has the same time in both, and if no group has a lower last sequence
    number in the later dump than in the earlier dump.
    """
    old = {record.group.name: record.calls.times_by_number() for record in before.groups}
    for record in after.groups:
        times_s = old.get(record.group.name, {})
        new = record.calls.times_by_number()
        if any(abs(times_s[seq] - at_s) > SAME_ENTRY_S for seq, at_s in new.items() if seq in times_s):
            return False
    a, b = _positions(before), _positions(after)
    return all(b[key][0] >= a[key][0] for key in a.keys() & b.keys())
