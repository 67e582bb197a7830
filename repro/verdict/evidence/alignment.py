"""Compare the collectives that each rank issued in a step with the schedule that the rank declared for this step.

A rank that leaves its own schedule has made a mistake, which we call a deviation. A rank that only differs from other
ranks may be right.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from repro.trace.witness.file import Witness
from repro.verdict.evidence.position import GroupKey
from repro.verdict.evidence.steps import Entry, Issued, Step


@dataclass(frozen=True, slots=True)
class Deviation:
    """A place where a rank left its declared schedule.

    An entry of the schedule is (group, operation, layer). The entry that is due is the next one in the schedule.

    kind     "extra": the rank issued one collective more than the schedule has. "skipped": it left entries out.
             "order": it issued an entry before another entry that was due first. "mismatch": it issued another
             operation than the one that was due, in the same group and layer
    index    the index of ``planned`` in the schedule, from 0
    entry    if "skipped": the first entry that the rank left out. If "order": the entry that was due, if the rank has
             not issued it yet; otherwise the entry that the rank issued too early. If "extra" or "mismatch": the entry
             that the rank issued wrongly
    planned  the entry that was due; None if all entries of the schedule had been issued before
    issued   the collective that the rank issued when ``planned`` was due; None if the step ended without one
    group    the group of ``entry``; None if it is not known
    """

    kind: str
    rank: int
    step: int
    index: int
    entry: Entry
    planned: Entry | None
    issued: Issued | None
    group: GroupKey | None

    @property
    def identity(self) -> tuple[str, int, int, Entry]:
        return self.kind, self.step, self.index, self.entry

    @property
    def concerned(self) -> set[int]:
        """Return the ranks that this affects: the members of the groups of ``entry`` and of ``issued``."""
        issued = self.issued.group[1] if self.issued else ()
        return {*issued, *(self.group[1] if self.group else ())}

    @property
    def habit(self) -> tuple[str, int, Entry]:
        return self.kind, self.index, self.entry


def align(rank: int, step: Step, groups: Mapping[str, GroupKey]) -> list[Deviation]:
    """Find all places in one step where the rank left its declared schedule, in the order of the schedule.

    `Deviation` describes the kinds. If the rank passed over some entries of the schedule, and issued a later entry, the
    kind is `order` in two cases:

    - The rank issued the passed-over entries afterwards.
    - The rank can still issue them. This is so if it has issued nothing after the later entry, the step has not ended,
      and no passed-over entry is of the group of the later entry. (Within one group, collectives are matched by number,
      and the later entry has taken the number of the passed-over one.)

    Otherwise the kind is `skipped`.

    groups   name of a group -> (name, members)
    """
    plan, issued = step.plan, step.issued
    if not plan:
        return []
    comparison = _Comparison(plan, [call.entry for call in issued])
    deviations: list[Deviation] = []

    def deviate(kind: str, entry: Entry, call: Issued | None) -> None:
        planned = plan[i] if i < len(plan) else None
        group = call.group if call is not None and call.entry == entry else groups.get(entry[0])
        deviations.append(Deviation(kind, rank, step.number, i, entry, planned, call, group))

    i = k = 0
    while k < len(issued):
        if i < len(plan) and issued[k].entry == plan[i]:
            i, k = i + 1, k + 1
            continue
        kind, skip = comparison.explain(k, i)
        if kind == "skipped":
            only_other_groups = issued[k].entry[0] not in {group for group, _, _ in plan[i : i + skip]}
            inverted = only_other_groups and k + 1 == len(issued) and not step.over
            deviate("order" if inverted else kind, plan[i], issued[k])
            i += skip
        elif kind == "order":
            deviate(kind, issued[k].entry, issued[k])
            i, k = i + skip, k + skip
        else:
            deviate(kind, issued[k].entry, issued[k])
            i, k = i + skip, k + 1
    if step.over and i < len(plan):
        deviate("skipped", plan[i], None)
    return deviations


class _Comparison:
    """Compares the entries of a declared schedule, ``plan``, with the ``entries`` that the rank issued."""

    def __init__(self, plan: Sequence[Entry], entries: Sequence[Entry]) -> None:
        self._plan, self._entries = plan, entries
        self._places: dict[Entry, list[int]] = {}
        for place, entry in enumerate(plan):
            self._places.setdefault(entry, []).append(place)

    def explain(self, k: int, i: int) -> tuple[str, int]:
        """Explain why a rank issued collective ``k`` of a step when entry ``i`` of its schedule was due.

        Both numbers count from 0.

        Return the kind of mistake, and how many entries of the schedule it concerns: those that were left out
        ("skipped"), replaced ("mismatch") or issued in another order ("order"); 0 for "extra". The kind is chosen so
        that as many of the following collectives as possible agree with the schedule.
        """
        plan, entry = self._plan, self._entries[k]
        if i == len(plan):
            return "extra", 0
        if block := self._permuted(k, i):
            return "order", block
        fits_extra = self._run(k + 1, i)
        later = self._next_place(entry, i)
        if later is not None:
            return ("skipped", later - i) if self._run(k, later) > fits_extra else ("extra", 0)
        same_place = (entry[0], entry[2]) == (plan[i][0], plan[i][2])
        if same_place and self._run(k + 1, i + 1) >= fits_extra:
            return "mismatch", 1
        return "extra", 0

    def _next_place(self, entry: Entry, i: int) -> int | None:
        """Return the first index, not below ``i``, at which the schedule has this entry; None if there is none."""
        places = self._places.get(entry, [])
        at = bisect.bisect_left(places, i)
        return places[at] if at < len(places) else None

    def _run(self, k: int, i: int) -> int:
        """Return how many issued entries in a row, from index ``k`` on, equal the schedule from index ``i`` on."""
        most = min(len(self._entries) - k, len(self._plan) - i)
        return next((n for n in range(most) if self._entries[k + n] != self._plan[i + n]), most)

    def _permuted(self, k: int, i: int) -> int:
        """Return n if the next n issued entries are the next n of the schedule in another order; otherwise 0.

        n is the smallest such number, at most 8. The next issued entry has index ``k``, that of the schedule ``i``.
        """
        surplus: Counter[Entry] = Counter()
        for n in range(min(len(self._entries) - k, len(self._plan) - i, 8)):
            surplus[self._entries[k + n]] += 1
            surplus[self._plan[i + n]] -= 1
            if not any(surplus.values()):
                return n + 1
        return 0


def unshared_deviations(
    witnesses: Mapping[int, Witness], all_steps: Mapping[int, list[Step]], since: int
) -> tuple[list[Deviation], list[Deviation]]:
    """Find, for each rank, its first deviation from step ``since`` on that can explain a hang.

    A deviation is a place where a rank left the schedule that it had declared. If all members of the group left their
    schedules in the same way in the same step, this cannot explain a hang, and is ignored.

    Return two lists, each with at most one deviation for each rank:

    - The first list also ignores a deviation if all members made the same deviation together in some other step.
    - The second list does not ignore such a deviation. It is needed only if nothing else explains the hang.

    all_steps   rank -> the rank's recent steps
    """
    by_rank: dict[int, list[Deviation]] = {}
    shared: dict[tuple[str, int, int, Entry], set[int]] = {}
    seen: dict[int, set[int]] = {}
    for rank, steps in all_steps.items():
        groups = {group.name: (group.name, group.members) for group in witnesses[rank].groups}
        for step in steps:
            if witnesses[rank].complete:  # if a witness is incomplete, the rank may have made the deviation, too
                seen.setdefault(step.number, set()).add(rank)
            for deviation in align(rank, step, groups):
                by_rank.setdefault(rank, []).append(deviation)
                shared.setdefault(deviation.identity, set()).add(rank)

    # The key has the id() of the tuple of members, because to hash the tuple itself takes long for a large group.
    cache: dict[tuple[object, ...], bool] = {}

    def is_shared(deviation: Deviation) -> bool:
        members = tuple(
            id(group[1]) for group in (deviation.group, deviation.issued and deviation.issued.group) if group
        )
        key = (*deviation.identity, *members)
        if key not in cache:
            cache[key] = deviation.concerned & seen.get(deviation.step, set()) <= shared[deviation.identity]
        return cache[key]

    habits = {d.habit for ds in by_rank.values() for d in ds if is_shared(d)}
    alone = [[d for d in ds if d.step >= since and not is_shared(d)] for ds in by_rank.values()]
    fresh = [next(iter(ds)) for ds in ([d for d in ds if d.habit not in habits] for ds in alone) if ds]
    return fresh, [ds[0] for ds in alone if ds]


def inverted_before(
    deviations: Sequence[Deviation], witnesses: Mapping[int, Witness], all_steps: Mapping[int, list[Step]]
) -> list[int]:
    """Return the ranks that had issued two collectives in the same wrong order in an earlier step.

    The earlier step did not hang, although the order was wrong. The evidence of the verdict mentions this.

    deviations   the places where ranks left their declared schedules; only those of the kind "order" are compared
    all_steps    rank -> the rank's recent steps
    """
    inverted = {(d.issued.entry, d.entry): d.step for d in deviations if d.kind == "order" and d.issued is not None}
    ranks = []
    for rank, steps in all_steps.items():
        groups = {group.name: (group.name, group.members) for group in witnesses[rank].groups}
        earlier = (d for step in steps for d in align(rank, step, groups) if d.kind == "order")
        if any(d.step < inverted.get((d.entry, d.planned), -1) for d in earlier if d.planned):
            ranks.append(rank)
    return sorted(ranks)
