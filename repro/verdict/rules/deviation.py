"""Explain a hang by the rank that first left its declared schedule, and describe what this rank did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repro.verdict.evidence.alignment import Deviation
from repro.verdict.evidence.ledger import TRANSFERS
from repro.verdict.evidence.position import RankState
from repro.verdict.evidence.sides import places
from repro.verdict.evidence.steps import Entry, Step
from repro.verdict.result import Finding, name_ranks, shorten


def deviation_finding(
    deviations: Sequence[Deviation], rank_states: Mapping[int, RankState], all_steps: Mapping[int, Sequence[Step]]
) -> Finding | None:
    """Name as culprits the ranks that were the first to leave their declared schedules.

    If it is not certain which ranks were first, all ranks that left their schedules are suspects. Return None if no
    rank left its schedule, or if all members of the group left their schedules in the same way.

    deviations   the place where each of these ranks left its schedule
    all_steps    rank -> the rank's recent steps
    """
    if not deviations:
        return None

    def when(deviation: Deviation) -> tuple[int, int]:
        return deviation.step, deviation.index

    first = min(deviations, key=when)
    alike = [d for d in deviations if _same_act(d, first)]
    if first.kind == "order":  # if another rank did the same and ended its step, it is clear that this is a skip
        first = next((d for d in alike if d.kind == "skipped"), first)
    culprits = tuple(sorted({d.rank for d in alike}))
    if {rank for rank in first.concerned if rank_states[rank].seen} <= set(culprits):
        return None  # all members made this deviation, though at different indices, so it cannot explain a hang
    finding = Finding(first.kind, culprits)
    finding.evidence += _sentences([first, *alike], rank_states)
    if first.kind == "order" and first.entry == first.planned:
        finding.evidence.append("this collective may be late or skipped altogether: the two look the same so far")
    rivals = [d for d in deviations if d.rank not in culprits]
    finding.evidence += _sentences(rivals, rank_states)
    if any(not _comes_before(first, rival, rank_states, all_steps) for rival in rivals):
        finding.suspects = tuple(sorted(d.rank for d in deviations))
        finding.culprits, finding.confidence = (), "undecided"
    finding.first_divergence = {"sides": [_deviant(first, culprits), *_conforming(first, culprits, rank_states)]}
    return finding


def _sentences(deviations: Sequence[Deviation], rank_states: Mapping[int, RankState]) -> list[str]:
    """Return sentences on how ranks left their schedules: "rank 3 issued dp all_reduce in step 4 … (rank003.wit:…)".

    Ranks that did the same share a sentence. It ends with the place of the event, if there is one, in the witness of
    one of them.
    """
    together: dict[str, dict[int, Deviation]] = {}
    for deviation in deviations:
        together.setdefault(_words(deviation), {})[deviation.rank] = deviation
    sentences = []
    for words, by_rank in together.items():
        first = next(iter(by_rank.values()))
        line = rank_states[first.rank].line(first.issued.n) if first.issued else ""
        sentences.append(f"{name_ranks(by_rank)} {words}" + (f" ({line})" if line else ""))
    return shorten(sentences)


def _comes_before(
    first: Deviation,
    other: Deviation,
    rank_states: Mapping[int, RankState],
    all_steps: Mapping[int, Sequence[Step]],
) -> bool:
    """Whether the rank of ``first`` certainly left its schedule before the rank of ``other`` left its own.

    Within one step, only the collectives of groups that contain both ranks show the order. So count, in the schedule of
    each rank, how many of these collectives come before the place where the rank left it, and compare the two counts.
    """
    if first.step != other.step:
        return first.step < other.step
    shared = {key[0] for key in rank_states[first.rank].issued.keys() & rank_states[other.rank].issued.keys()}

    def place(deviation: Deviation) -> int:
        plan = next(step.plan for step in all_steps[deviation.rank] if step.number == deviation.step)
        return sum(group in shared and op not in TRANSFERS for group, op, _ in plan[: deviation.index])

    return place(first) < place(other)


def _same_act(one: Deviation, two: Deviation) -> bool:
    """Whether two ranks made the same mistake: at the same schedule entry of one step, or by the same collective.

    The kinds of the two deviations can differ, for example if the ranks declared different schedules.
    """
    passed_over = {one.kind, two.kind} <= {"skipped", "order"}
    if (one.step, one.entry) == (two.step, two.entry) and (one.kind == two.kind or passed_over):
        return True
    if one.issued is None or two.issued is None:
        return False
    return (one.issued.group, one.issued.seq, one.issued.entry) == (two.issued.group, two.issued.seq, two.issued.entry)


def _words(deviation: Deviation) -> str:
    entry = _entry(deviation.entry)
    where = f"in step {deviation.step}"
    planned = f"the schedule said {_entry(deviation.planned)}" if deviation.planned else "the schedule had ended"
    site = f" at {deviation.issued.site}" if deviation.issued and deviation.issued.site else ""
    match deviation.kind:
        case "skipped" if deviation.issued is None:
            return f"ended step {deviation.step} without {entry}"
        case "skipped":
            assert deviation.issued is not None
            return f"skipped {entry} {where} and issued {_entry(deviation.issued.entry)}{site}"
        case "order" if deviation.issued is not None and deviation.entry == deviation.planned:
            return f"issued {_entry(deviation.issued.entry)} {where}{site} before {entry}, which was due first"
        case "order":
            return f"issued {entry} {where}{site} where {planned}, and issued that later"
        case "mismatch":
            return f"issued {entry} {where}{site} in place of {_entry(deviation.planned)}"
        case _:
            return f"issued {entry} {where}{site} which is not in the schedule: {planned}"


def _entry(entry: Entry | None) -> str:
    if entry is None:
        return "nothing"
    group, op, layer = entry
    return f"{group} {op}" + (f" of {layer}" if layer else "")


def _deviant(deviation: Deviation, culprits: Sequence[int]) -> dict[str, Any]:
    """Return the part of ``first_divergence`` that describes the culprits: what they issued, and what was planned."""
    issued = deviation.issued
    group, op, layer = issued.entry if issued else deviation.entry
    return {
        "ranks": list(culprits), "group": group, "seq": issued.seq if issued else 0, "op": op if issued else "",
        "layer": layer if issued else "", "step": deviation.step, "site": issued.site if issued else "",
        "planned": _entry(deviation.planned), "conforms": False,
    }  # fmt: skip


def _conforming(
    deviation: Deviation, culprits: Sequence[int], rank_states: Mapping[int, RankState]
) -> list[dict[str, Any]]:
    """Return the part of ``first_divergence`` that describes the members of the group that are no culprits.

    The result has a dict for each place (collective, step and call site), with the members that are there.
    """
    members = set(deviation.group[1]) if deviation.group else set(rank_states)
    return places([rank_states[rank] for rank in sorted(members - set(culprits)) if rank in rank_states])
