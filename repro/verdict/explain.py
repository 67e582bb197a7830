"""Why ranks stand where they stand: the cause and who is to blame, or an admission that the evidence is silent.

Guilt is to leave one's own declared schedule, to hold a lock into a collective, or to contradict what another rank
says of itself. Being alone, late, or unlike earlier steps makes a suspect, never a culprit: the others may be the
ones who should have changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repro.verdict.graph import Node, Waits
from repro.verdict.ledger import Call, Ledger, Side, calls, widest
from repro.verdict.position import GroupKey, Standing
from repro.verdict.result import Finding, name_ranks, say
from repro.verdict.schedule import (
    RECENT_STEPS,
    Deviation,
    Entry,
    Parting,
    Step,
    blamable,
    first_parting,
    habitual_plan,
    inverted_before,
    plans_of,
    steps_of,
    with_plan,
)
from repro.witness import Witness


def explain(
    witnesses: Mapping[int, Witness],
    standings: Mapping[int, Standing],
    ledger: Ledger,
    waits: Waits,
    mispaired: tuple[GroupKey, int] | None = None,
) -> Finding:
    """The cause of a hang, or of the wrong pairing of one collective: what a rank did after that did not cause it."""
    lock = _lock_finding(waits, standings)
    if lock is not None:
        return lock
    divergence = ledger.first_divergence()
    steps = [standing.position.step for standing in standings.values() if standing.position.step >= 0]
    since = min(steps, default=0)
    if divergence is not None:
        since = min(since, *(side.call.step for side in divergence[2]))
    # A wrong pairing may go on for long before it is looked at.
    num_steps = max(RECENT_STEPS, max(steps, default=0) - since + 2)
    all_steps = {rank: steps_of(witness, num_steps) for rank, witness in witnesses.items()}

    parting = first_parting(witnesses, all_steps, since)
    fresh, habitual = (
        _until(mispaired, [d for d in found if parting is None or parting.comes_after(d)], witnesses)
        for found in blamable(witnesses, all_steps, since)
    )
    finding = _deviation_finding(fresh, standings) or _plan_finding(witnesses, all_steps, parting)
    if finding is not None and finding.cause == "order" and (ranks := inverted_before(fresh, witnesses, all_steps)):
        finding.evidence.append(f"in earlier steps {name_ranks(ranks)} issued both, in that order")
    finding = (
        finding or _deviation_finding(habitual, standings) or _habit_finding(witnesses, all_steps, since, standings)
    )
    if finding is None and divergence is not None:
        finding = _pairing_finding(witnesses, divergence)
    if finding is None:
        finding = Finding(confidence="undecided")
    if finding.confidence == "undecided":
        finding.evidence.append(
            "guilt is not in evidence: record each step's declared schedule, or read both call sites"
        )
    if finding.first_divergence is None:
        finding.first_divergence = _sides(divergence) if divergence else _positions(waits.cycle, standings)
    return finding


def _until(
    meeting: tuple[GroupKey, int] | None, deviations: list[Deviation], witnesses: Mapping[int, Witness]
) -> list[Deviation]:
    """The deviations that a member had made by the time it issued its part of a collective, by its own clock."""
    if meeting is None:
        return deviations
    issued_ns = {
        rank: row.t_ns
        for rank in meeting[0][1]
        if rank in witnesses
        for _, _, row, _ in calls(witnesses[rank], *meeting)
    }
    members = [d for d in deviations if d.rank in issued_ns]
    return [d for d in members if d.issued is None or d.issued.t_ns <= issued_ns[d.rank]]


def _lock_finding(waits: Waits, standings: Mapping[int, Standing]) -> Finding | None:
    locks = [node for node in waits.cycle if node.key[0] == "lock"]
    if not locks:
        return None
    holders = sorted((rank, node.name) for node in locks for rank in node.waits_for if rank in waits.at)
    finding = Finding("lock", tuple(sorted({rank for rank, _ in holders})))
    for rank, lock in holders:
        finding.evidence.append(f"rank {rank} holds {lock} and {_waits(standings[rank])}")
    finding.first_divergence = _positions(waits.cycle, standings)
    return finding


def _waits(standing: Standing) -> str:
    return standing.position.words().replace("wait", "waits", 1)


def _deviation_finding(deviations: Sequence[Deviation], standings: Mapping[int, Standing]) -> Finding | None:
    """Blame the earliest deviation, and with it all ranks that did the same."""
    if not deviations:
        return None

    def when(deviation: Deviation) -> tuple[int, int]:
        return deviation.step, deviation.index

    first = min(deviations, key=when)
    alike = [d for d in deviations if _same_act(d, first)]
    if first.kind == "order":  # one that is seen to have skipped it tells what the others were about to do
        first = next((d for d in alike if d.kind == "skipped"), first)
    culprits = tuple(sorted({d.rank for d in alike}))
    if {rank for rank in first.concerned if standings[rank].seen} <= set(culprits):
        return None  # all members did it, though not at one place: that is no difference to explain anything with
    finding = Finding(first.kind, culprits)
    line = standings[first.rank].line(first.issued.n) if first.issued else ""
    finding.evidence.append(f"{name_ranks(culprits)} {_tell(first)}" + (f" ({line})" if line else ""))
    if first.kind == "order" and first.entry == first.planned:
        finding.evidence.append("had it never come, it would have been skipped; from here both look the same")
    rivals = [d for d in deviations if d.rank not in culprits]
    if rivals:
        finding.evidence.append(f"{name_ranks(sorted(d.rank for d in rivals))} {_tell(rivals[0])}")
    if any(when(rival) == when(first) for rival in rivals):  # neither came first: both left their word
        finding.suspects = tuple(sorted(d.rank for d in deviations))
        finding.culprits, finding.confidence = (), "undecided"
    finding.first_divergence = {"sides": [_deviant(first, culprits), *_conforming(first, culprits, standings)]}
    return finding


def _same_act(one: Deviation, two: Deviation) -> bool:
    """Whether two ranks did the same thing, though their own plans may make it look different."""
    passed_over = {one.kind, two.kind} <= {"skipped", "order"}
    if (one.step, one.entry) == (two.step, two.entry) and (one.kind == two.kind or passed_over):
        return True
    if one.issued is None or two.issued is None:
        return False
    return (one.issued.group, one.issued.seq, one.issued.entry) == (two.issued.group, two.issued.seq, two.issued.entry)


def _tell(deviation: Deviation) -> str:
    entry = _entry(deviation.entry)
    where = f"in step {deviation.step}"
    planned = f"the schedule said {_entry(deviation.planned)}" if deviation.planned else "the schedule was over"
    site = f" at {deviation.issued.site}" if deviation.issued and deviation.issued.site else ""
    match deviation.kind:
        case "skipped" if deviation.issued is None:
            return f"ended step {deviation.step} without {entry}"
        case "skipped":
            assert deviation.issued is not None
            return f"passed over {entry} {where} and issued {_entry(deviation.issued.entry)}{site}"
        case "order" if deviation.issued is not None and deviation.entry == deviation.planned:
            return f"issued {_entry(deviation.issued.entry)} {where}{site} before {entry}, which was due first"
        case "order":
            return f"issued {entry} {where}{site} where {planned}, and that later"
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
    issued = deviation.issued
    group, op, layer = issued.entry if issued else deviation.entry
    return {
        "ranks": list(culprits), "group": group, "seq": issued.seq if issued else 0, "op": op if issued else "",
        "layer": layer if issued else "", "step": deviation.step, "site": issued.site if issued else "",
        "planned": _entry(deviation.planned), "conforms": False,
    }  # fmt: skip


def _conforming(
    deviation: Deviation, culprits: Sequence[int], standings: Mapping[int, Standing]
) -> list[dict[str, Any]]:
    """Where the members that did not deviate stand."""
    members = set(deviation.group[1]) if deviation.group else set(standings)
    return _places([standings[rank] for rank in sorted(members - set(culprits)) if rank in standings])


def _places(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    places: dict[tuple[str, int, str, str, int, str], list[int]] = {}
    for standing in standings:
        at = standing.position
        places.setdefault((at.group, at.seq, at.op, at.layer, at.step, at.site), []).append(standing.rank)
    return [
        {"ranks": ranks, "group": group, "seq": seq, "op": op, "layer": layer, "step": step, "site": site}
        for (group, seq, op, layer, step, site), ranks in places.items()
    ]


def _positions(cycle: Sequence[Node], standings: Mapping[int, Standing]) -> dict[str, Any] | None:
    sides = [place for node in cycle for place in _places([standings[rank] for rank in node.ranks])]
    return {"sides": sides} if sides else None


def _sides(divergence: tuple[GroupKey, int, list[Side]]) -> dict[str, Any]:
    key, seq, sides = divergence
    return {
        "sides": [
            {
                "ranks": list(side.ranks), "group": key[0], "seq": seq, "op": side.call.signature.op,
                "layer": side.call.signature.layer, "step": side.call.step, "site": side.site,
                "sizes": list(side.call.sizes), "dtype": side.call.signature.dtype,
                "reduce_op": side.call.signature.reduce_op, "root": side.call.root,
            }
            for side in sides
        ]
    }  # fmt: skip


def _plan_finding(
    witnesses: Mapping[int, Witness], all_steps: Mapping[int, list[Step]], parting: Parting | None
) -> Finding | None:
    """Every rank kept its word, but the words of a group's members differ: who changed its own is suspect."""
    if parting is None:
        return None
    number, key, sides = parting.step, parting.group, parting.sides
    declared = sorted(plans_of(key, witnesses, all_steps).items())
    before = [set(plans) for (step, part), plans in declared if step < number and part == parting.part]
    usual = before[-1] if len(before) >= 2 and len(before[-1]) == 1 and before[-1] == before[-2] else set()
    suspects = sorted(rank for plan, ranks in sides.items() if plan not in usual for rank in ranks)
    same_entries = len({tuple(sorted(plan)) for plan in sides}) == 1
    named = ", ".join(f"{name_ranks(ranks)}: {len(plan)} entries" for plan, ranks in sides.items())
    finding = Finding("order" if same_entries else "mismatch", confidence="undecided")
    finding.evidence.append(f"the schedules that members of {key[0]} declared for step {number} differ ({named})")
    if usual & set(sides) and len(suspects) < sum(map(len, sides.values())):
        finding.suspects = tuple(suspects)
        finding.evidence.append(f"{name_ranks(suspects)} changed a schedule that all had shared until then")
    elif len(few := min(sides.values(), key=len)) * 2 < sum(map(len, sides.values())):
        finding.suspects = tuple(few)
        finding.evidence.append(f"{name_ranks(few)} declared what most did not; who is right is not in the witnesses")
    return finding


def _habit_finding(
    witnesses: Mapping[int, Witness],
    all_steps: Mapping[int, list[Step]],
    since: int,
    standings: Mapping[int, Standing],
) -> Finding | None:
    """No schedule was declared: who left what all ranks did in every earlier step is suspect."""
    plan = habitual_plan(all_steps, since)
    if not plan or any(step.plan for steps in all_steps.values() for step in steps):
        return None
    finding = _deviation_finding(blamable(witnesses, with_plan(all_steps, plan), since)[0], standings)
    if finding is not None:
        finding.culprits, finding.suspects, finding.confidence = (), finding.culprits, "undecided"
        finding.evidence.append("no schedule was declared: this is judged by what all ranks did in every earlier step")
    return finding


def _pairing_finding(witnesses: Mapping[int, Witness], divergence: tuple[GroupKey, int, list[Side]]) -> Finding | None:
    """Ranks agree on the order but not on the arguments."""
    key, seq, sides = divergence
    cause = widest(sides)
    if cause not in ("mismatch", "sizes"):
        return None
    finding = Finding(cause, confidence="undecided", first_divergence=_sides(divergence))
    for side in sides:
        finding.evidence.append(f"{name_ranks(side.ranks)} issued {key[0]} #{seq} as {_call(side.call)}")
    if cause == "sizes" and len({(side.call.signature.layer, side.call.step) for side in sides}) > 1:
        _explain_places(finding, witnesses, divergence)
    elif cause == "sizes" and (culprits := _false_sizes(key, sides)):
        finding.culprits, finding.confidence = culprits, "certain"
        finding.evidence.append(
            f"{name_ranks(culprits)} named sizes of other ranks that those ranks and all third ones contradict"
        )
        return finding
    finding.suspects = _changed(witnesses, key, seq, sides)
    if finding.suspects:
        finding.evidence.append(f"{name_ranks(finding.suspects)} changed what all ranks had done alike until then")
    elif few := _fewest(sides):
        finding.suspects = few
        finding.evidence.append(f"{say(few, 'differ')} from most members; which side is right is not in the witnesses")
    return finding


def _fewest(sides: Sequence[Side]) -> tuple[int, ...]:
    """The ranks that do not do what more than half of the members do; () where no side is that large."""
    most = max(sides, key=lambda side: len(side.ranks))
    others = sorted(rank for side in sides if side is not most for rank in side.ranks)
    return tuple(others) if len(others) < len(most.ranks) else ()


def _explain_places(
    finding: Finding, witnesses: Mapping[int, Witness], divergence: tuple[GroupKey, int, list[Side]]
) -> None:
    """Sizes of two layers need not be equal: that the ranks are not at the same place is what is to be explained."""
    key, seq, sides = divergence
    finding.cause = ""
    finding.evidence.append("they did not issue it for the same layer and step")
    for side in sides:
        others = {other.call for other in sides if other is not side}
        following = [call for rank in side.ranks for _, _, _, call in calls(witnesses[rank], key, seq + 1)]
        if len(following) == len(side.ranks) and others.issuperset(following):
            finding.cause = "order"
            finding.evidence.append(f"{name_ranks(side.ranks)} issued as #{seq + 1} what others issued as #{seq}")
            return


def _call(call: Call) -> str:
    parts = [call.signature.op, call.signature.dtype, call.signature.reduce_op]
    parts += [f"sizes {list(call.sizes)}"] if call.sizes else []
    parts += [f"root {call.root}"] if call.root >= 0 else []
    return " ".join(part for part in parts if part)


def _false_sizes(key: GroupKey, sides: Sequence[Side]) -> tuple[int, ...]:
    """Ranks that are wrong about another rank's size: its own word and every third rank's stand against theirs.

    A third rank knows the size only from the agreement, so it is the agreement that the culprit does not hold. A rank
    that alone contradicts all others about itself is not blamed: it may be right.
    """
    members = key[1]
    vector = {rank: side.call.sizes for side in sides for rank in side.ranks}
    if any(len(sizes) != len(members) for sizes in vector.values()):
        return ()

    def is_wrong(rank: int) -> bool:
        for i, owner in enumerate(members):
            if owner == rank or owner not in vector or vector[rank][i] == vector[owner][i]:
                continue
            third = [sizes[i] for other, sizes in vector.items() if other not in (rank, owner)]
            if third and all(size == vector[owner][i] for size in third):
                return True
        return False

    return tuple(sorted(rank for rank in vector if is_wrong(rank)))


def _changed(witnesses: Mapping[int, Witness], key: GroupKey, seq: int, sides: Sequence[Side]) -> tuple[int, ...]:
    """The side that changed the arguments of a collective that all members used to call alike."""
    layer = {side.call.signature.layer for side in sides}
    ops = {side.call.signature.op for side in sides}
    if len(layer) != 1 or len(ops) != 1:
        return ()
    habit: set[Call] = set()
    times: list[int] = []
    for rank in key[1]:
        if rank not in witnesses:
            continue
        past = [
            call._replace(step=-1)
            for other, number, _, call in calls(witnesses[rank])
            if other == key and number < seq and {call.signature.layer} == layer and {call.signature.op} == ops
        ]
        habit.update(past)
        times.append(len(past))
    if len(habit) != 1 or min(times, default=0) < 2:
        return ()
    usual = habit.pop()
    odd = [side for side in sides if side.call._replace(step=-1) != usual]
    return tuple(sorted(rank for side in odd for rank in side.ranks)) if len(odd) < len(sides) else ()
