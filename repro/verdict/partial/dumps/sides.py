"""Judge members of a group that queued different operations under one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from repro.trace.observed import Call, Group, GroupRecord
from repro.trace.operations import NO_NUMBER, Form
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.habits import left_rhythm
from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import arguments, program_frames, ranks_of, verb

UNKNOWN_INSIDE = ("coalesced", "unknown")
"""Entries that stand for several operations, or for one that the recorder does not name."""


def different_arguments(scene: Scene, groups: Mapping[Group, Mapping[int, GroupRecord]]) -> Diagnosis | None:
    """The earliest operation that members of a group queued differently under one number."""
    differences = []
    for group, records in groups.items():
        number = _first_difference(records)
        if number is not None:
            sides: dict[tuple[object, ...], list[tuple[int, Call]]] = {}
            for rank, record in sorted(records.items()):
                for call in record.calls.numbered(number):
                    if call.op not in UNKNOWN_INSIDE:
                        sides.setdefault(_comparable(call), []).append((rank, call))
            at_s = min(call.at_s or 0.0 for side in sides.values() for _, call in side)
            differences.append((at_s, group, number, list(sides.values()), records))
    if not differences:
        return None
    _, group, number, variants, records = min(differences, key=lambda row: row[0])
    return _sides(scene, group, number, variants, records)


def _first_difference(records: Mapping[int, GroupRecord]) -> int | None:
    """The lowest number under which two members queued different things; linear in the calls of all."""
    first: dict[int, tuple[object, ...]] = {}
    differing: set[int] = set()
    shared: dict[tuple[object, ...], tuple[object, ...]] = {}  # so that equal ones are compared by address
    for record in records.values():
        compared = [None if form.op in UNKNOWN_INSIDE else _comparable(form) for form in record.calls.forms]
        compared = [None if each is None else shared.setdefault(each, each) for each in compared]
        for seq, form in zip(record.calls.seqs, record.calls.form, strict=True):
            mine = compared[form]
            if seq != NO_NUMBER and mine is not None and first.setdefault(seq, mine) is not mine:
                differing.add(seq)
    return min(differing, default=None)


def _comparable(call: Call | Form) -> tuple[object, ...]:
    """What must agree. Of rooted operations sizes differ with the role: the root of a gather alone has an output."""
    if call.op in ("gather", "scatter", "reduce", "broadcast"):
        return call.op, call.dtypes[:1]
    if call.op in ("all_to_all", "barrier"):
        return (call.op,)
    if call.op == "all_gather" and len(call.sizes) > 2:  # uneven: the input differs, the list of outputs does not
        return call.op, call.sizes[1:], call.dtypes
    if call.op == "reduce_scatter" and len(call.sizes) > 2:
        return call.op, call.sizes[:-1], call.dtypes
    return call.op, call.sizes, call.dtypes


def _sides(
    scene: Scene,
    group: Group,
    number: int,
    sides: Sequence[Sequence[tuple[int, Call]]],
    records: Mapping[int, GroupRecord],
) -> Diagnosis:
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
            "The operations before it are reduces, whose result one rank alone has: ranks may have "
            "decided by different numbers."
        )
    if few:
        evidence.append(
            f"{ranks_of(few).capitalize()} {verb(few, 'stands', 'stand')} out. To be few is no proof "
            "of who left the common program."
        )
    left = left_rhythm(scene, [(rank, call) for side in sides for rank, call in side])
    if left is not None:
        evidence.append(left.sentence)
    culprits = (left.rank,) if left is not None and left.convincing else ()
    verdict = "corrupt" if len(done) == sum(map(len, sides)) else "deadlock"
    return Diagnosis(
        verdict, "sizes" if same_op else "mismatch", culprits, () if culprits else tuple(few), "likely",
        (f"Members of {shown} queued different operations under number {number}.",),
        tuple(evidence),
        ("The dumps are of different jobs, or two groups share the name.",),
        (
            "the code that decides between these two calls: log the condition (why each rank took "
        "its branch) on every rank",
            COLLECT["stacks"],
        ),
    )  # fmt: skip
