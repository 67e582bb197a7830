"""Compare the schedules that the members of a group declared for the same step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from repro.trace.witness.file import Witness
from repro.verdict.evidence.alignment import Deviation
from repro.verdict.evidence.ledger import TRANSFERS
from repro.verdict.evidence.position import GroupKey
from repro.verdict.evidence.steps import Entry, Step


def plans_of(
    key: GroupKey, witnesses: Mapping[int, Witness], all_steps: Mapping[int, list[Step]]
) -> dict[tuple[int, int], dict[tuple[Entry, ...], list[int]]]:
    """Return the schedules that the members of a group declared: {(step, part): {schedule: ranks that declared it}}.

    A rank declares the schedule of a step in parts, because the second part depends on the step agreement. The parts
    are numbered from 0.

    The returned schedules have only the entries that must be equal on all members of the group: the entries of groups
    to which all these members belong. Sends and receives are left out, because sender and receiver declare different
    entries.

    key   (name, members) of the group
    """
    members = set(key[1])
    plans: dict[tuple[int, int], dict[tuple[Entry, ...], list[int]]] = {}
    for rank in sorted(members & all_steps.keys()):
        shared = {group.name for group in witnesses[rank].groups if members <= set(group.members)}
        for step in all_steps[rank]:
            for part, declared in enumerate(step.parts if step.plan else ()):
                plan = tuple(e for e in declared if e[0] in shared and e[1] not in TRANSFERS)
                plans.setdefault((step.number, part), {}).setdefault(plan, []).append(rank)
    return plans


@dataclass(frozen=True, slots=True)
class ScheduleDivergence:
    """The first step for which members of a group declared different schedules.

    part     number of the part of the schedule that differs, from 0; a rank declares the schedule of a step in parts
    group    (name, members) of the group
    sides    each of the different schedules for this part -> the ranks that declared it. These schedules have only the
             entries that must be equal on all members
    places   rank -> where the difference begins: an index in this rank's schedule of the whole step, from 0
    """

    step: int
    part: int
    group: GroupKey
    sides: Mapping[tuple[Entry, ...], list[int]]
    places: Mapping[int, int]

    def comes_after(self, deviation: Deviation) -> bool:
        """Whether this difference between the schedules of several ranks comes after ``deviation``.

        If not, the judge does not take the deviation as the cause of a hang, because the schedules differed before it.
        The two places are compared by step, and within a step by index in the schedule of the rank that deviated.

        deviation: a place where one rank left the schedule that it had declared itself
        """
        place = self.places.get(deviation.rank, deviation.index + 1)
        return (deviation.step, deviation.index) < (self.step, place)


def first_schedule_divergence(
    witnesses: Mapping[int, Witness], all_steps: Mapping[int, list[Step]], since: int
) -> ScheduleDivergence | None:
    """Find the first step, from ``since`` on, for which members of a group declared different schedules.

    If the members of several groups declared different schedules for this step, take the largest of these groups.
    Return None if no schedules differ.
    """
    differing = [
        (at, key, sides)
        for key in sorted({(g.name, g.members) for witness in witnesses.values() for g in witness.groups})
        for at, sides in plans_of(key, witnesses, all_steps).items()
        if at[0] >= since and len(sides) > 1
    ]
    if not differing:
        return None
    (number, part), key, sides = min(differing, key=lambda row: (row[0], -len(row[1][1])))
    alike = (len(set(entries)) == 1 for entries in zip(*sides, strict=False))
    common = sum(itertools.takewhile(bool, alike))
    places = {}
    for plan, ranks in sides.items():
        for rank in ranks:
            (parts,) = (step.parts for step in all_steps[rank] if step.number == number)
            shared = [place for place, entry in enumerate(parts[part]) if entry in plan]
            places[rank] = sum(map(len, parts[:part])) + (shared[common - 1] + 1 if common else 0)
    return ScheduleDivergence(number, part, key, sides, places)
