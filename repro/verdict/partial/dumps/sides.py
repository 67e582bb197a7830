"""Judge members of a group that queued different operations under the same sequence number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from repro.trace.foreign.operations import NO_NUMBER, Form
from repro.trace.foreign.records import Call, Group, GroupRecord
from repro.trace.knowledge import Knows
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.habits import left_rhythm
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import arguments, program_frames, ranks_of, verb

UNKNOWN_INSIDE = ("coalesced", "unknown")
"""Names of operations that are not compared: the recorder writes these names for several operations
at once, or for an operation that it does not know."""


def different_arguments(job: JobRecords, groups: Mapping[Group, Mapping[int, GroupRecord]]) -> Diagnosis | None:
    """Judge the earliest difference: under one sequence number, members of a group queued different operations.

    Operations also differ if their arguments differ. But if a member's dump has no arguments, only the names of the
    operations are compared. Return None if nothing differs.

    groups   for each group, a dict from rank to what the rank recorded in the group
    """
    knows = {rank: dump.knows for rank, dump in job.recorders.items()}
    differences = []
    for group, records in groups.items():
        comparable = {rank: record for rank, record in records.items() if Knows.ARGUMENTS in knows[rank]}
        found = [_first_difference(comparable, _comparable)]
        if len(comparable) < len(records):
            found.append(_first_difference(records, _operation))
        for difference in found:
            if difference is not None:
                number, variants = difference
                at_s = min(call.at_s or 0.0 for side in variants for _, call in side)
                differences.append((at_s, group, number, variants, records))
    if not differences:
        return None
    is_first = len(differences) == 1 or all(Knows.TIME in each for each in knows.values())
    _, group, number, variants, records = min(differences, key=lambda row: row[0])
    return _sides(job, group, number, variants, records, is_first)


Sides = list[list[tuple[int, Call]]]
"""The different operations under one sequence number. Each inner list has (rank, call) of all ranks that queued the
same operation."""


def _first_difference(
    records: Mapping[int, GroupRecord], compared: Callable[[Call | Form], tuple[object, ...]]
) -> tuple[int, Sides] | None:
    """Return the lowest sequence number under which members queued different operations, and these operations.

    For each of the different operations, the result has a list of (rank, call), one for each member that queued it.

    records    rank -> what the rank recorded in the group
    compared   a function that returns the fields of a call that must be equal on all members

    Return None if no operations differ. The time is linear in the number of calls.
    """
    first: dict[int, tuple[object, ...]] = {}
    differing: set[int] = set()
    # equal tuples are replaced by one object, because comparing by identity is fast
    shared: dict[tuple[object, ...], tuple[object, ...]] = {}
    for record in records.values():
        forms = [None if form.op in UNKNOWN_INSIDE else compared(form) for form in record.calls.forms]
        forms = [None if each is None else shared.setdefault(each, each) for each in forms]
        for seq, form in zip(record.calls.seqs, record.calls.form, strict=True):
            mine = forms[form]
            if seq != NO_NUMBER and mine is not None and first.setdefault(seq, mine) is not mine:
                differing.add(seq)
    if not differing:
        return None
    sides: dict[tuple[object, ...], list[tuple[int, Call]]] = {}
    for rank, record in sorted(records.items()):
        for call in record.calls.numbered(min(differing)):
            if call.op not in UNKNOWN_INSIDE:
                sides.setdefault(compared(call), []).append((rank, call))
    return min(differing), list(sides.values())


def _operation(call: Call | Form) -> tuple[object, ...]:
    return (call.op,)


def _comparable(call: Call | Form) -> tuple[object, ...]:
    """Return the fields of a call that must be equal on all members.

    For an operation with a root, such as broadcast, the sizes are not compared, because only the root has all sizes.
    """
    if call.op in ("gather", "scatter", "reduce", "broadcast"):
        return call.op, call.dtypes[:1]
    if call.op in ("all_to_all", "barrier"):
        return (call.op,)
    # Members of an all_gather may have different input sizes, but the list of output sizes is equal on all.
    if call.op == "all_gather" and len(call.sizes) > 2:
        return call.op, call.sizes[1:], call.dtypes
    if call.op == "reduce_scatter" and len(call.sizes) > 2:
        return call.op, call.sizes[:-1], call.dtypes
    return call.op, call.sizes, call.dtypes


def _sides(
    job: JobRecords,
    group: Group,
    number: int,
    sides: Sequence[Sequence[tuple[int, Call]]],
    records: Mapping[int, GroupRecord],
    is_first: bool,
) -> Diagnosis:
    """Make the diagnosis for members of a group that queued different operations under one sequence number.

    sides      for each of the different operations: (rank, call) of each member that queued it
    is_first   whether it is certain that no earlier operation differed. If it is not, no rank is named as culprit
    """
    shown = replace(group, description=next(iter(records.values())).group.description)
    sides = sorted(sides, key=lambda side: (len(side), side[0][0]))
    done = [rank for side in sides for rank, call in side if call.done]
    same_op = len({side[0][1].op for side in sides}) == 1
    few = [rank for rank, _ in sides[0]] if len(sides[0]) < len(sides[-1]) else []
    evidence = []
    for side in sides:
        ranks, call = [rank for rank, _ in side], side[0][1]
        place = program_frames(call.frames)
        evidence.append(
            f"{ranks_of(ranks).capitalize()} queued #{number} of {shown} as {arguments(call)}"
            + (f", from {place}" if place else "") + f" ({call.source})"
        )  # fmt: skip
    longest = max(records.values(), key=lambda record: len(record.calls)).calls
    before = [op for seq, op in zip(longest.seqs, longest.ops(), strict=True) if NO_NUMBER < seq < number][-2:]
    if before and set(before) == {"reduce"}:
        evidence.append(
            "The operations before this one are reduces, whose result only one rank has: the ranks may have decided "
            "by different numbers."
        )
    if few:
        evidence.append(
            f"{ranks_of(few).capitalize()} {verb(few, 'stands', 'stand')} out: fewer ranks queued this call. That is "
            "no proof that they are wrong."
        )
    left = left_rhythm(job, [(rank, call) for side in sides for rank, call in side])
    if left is not None:
        evidence.append(left.sentence)
    culprits = (left.rank,) if left is not None and left.convincing and is_first else ()
    verdict = "corrupt" if len(done) == sum(map(len, sides)) else "deadlock"
    return Diagnosis(
        verdict, "sizes" if same_op else "mismatch", culprits, () if culprits else tuple(few), "likely",
        (f"Members of {shown} queued different operations under number {number}.",),
        tuple(evidence),
        ("The dumps are of different jobs, or two groups share the name.",),
        (
            "the condition in the code that chooses between these two calls: log its value on every rank",
            COLLECT["stacks"],
        ),
    )  # fmt: skip
