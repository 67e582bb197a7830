"""Explain a hang by a collective that the members of a group issued with different arguments, such as sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro.trace.witness.file import Witness
from repro.verdict.evidence.ledger import UNKNOWN, Call, CallVariant, calls, worst_difference
from repro.verdict.evidence.position import GroupKey
from repro.verdict.evidence.sides import calls_of_sides
from repro.verdict.result import Finding, name_ranks, say


def arguments_finding(
    witnesses: Mapping[int, Witness], divergence: tuple[GroupKey, int, list[CallVariant]]
) -> Finding | None:
    """Explain a hang by a collective that members of a group issued with different arguments.

    Return None if only the layers or steps of the calls differ.

    divergence   (group, sequence number, the different calls)
    """
    key, seq, sides = divergence
    cause = worst_difference(sides)
    if cause not in ("mismatch", "sizes"):
        return None
    finding = Finding(cause, confidence="undecided", first_divergence=calls_of_sides(divergence))
    for side in sides:
        finding.evidence.append(f"{name_ranks(side.ranks)} issued {key[0]} #{seq} as {_call(side.call)}")
    if cause == "sizes" and len({(side.call.signature.layer, side.call.step) for side in sides}) > 1:
        _explain_places(finding, witnesses, divergence)
    elif cause == "sizes" and (culprits := _false_sizes(key, sides)):
        finding.culprits, finding.confidence = culprits, "certain"
        finding.evidence.append(
            f"the sizes that {name_ranks(culprits)} passed for other ranks are contradicted by those ranks and by all "
            "remaining members"
        )
        return finding
    finding.suspects = _changed(witnesses, key, seq, sides)
    if finding.suspects:
        finding.evidence.append(f"{name_ranks(finding.suspects)} changed arguments that had been the same on all ranks")
    elif minority := _minority(sides):
        finding.suspects = minority
        finding.evidence.append(
            f"{say(minority, 'differ')} from most members; the witnesses do not show which side is right"
        )
    return finding


def _minority(sides: Sequence[CallVariant]) -> tuple[int, ...]:
    """Return the ranks that did not issue the most common call; () if at most half of the ranks issued this call.

    sides   each of the different calls that members issued under one sequence number, with the ranks that issued it
    """
    most = max(sides, key=lambda side: len(side.ranks))
    others = sorted(rank for side in sides if side is not most for rank in side.ranks)
    return tuple(others) if len(others) < len(most.ranks) else ()


def _explain_places(
    finding: Finding, witnesses: Mapping[int, Witness], divergence: tuple[GroupKey, int, list[CallVariant]]
) -> None:
    """Replace the cause `sizes` of a finding whose different calls are of different layers or steps.

    Calls of different layers or steps may rightly differ in size.

    The new cause is `order` if some ranks issued one number later what other ranks issued at the divergence. An
    example: as #7, rank 0 issued A and rank 1 issued B; then rank 0 issued B as #8. Otherwise no cause is known ("").

    divergence   (group, sequence number, the different calls)
    """
    key, seq, sides = divergence
    finding.cause = ""
    finding.evidence.append("the ranks did not issue it for the same layer and step")
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
    return " ".join(part for part in parts if part not in ("", UNKNOWN))


def _false_sizes(key: GroupKey, sides: Sequence[CallVariant]) -> tuple[int, ...]:
    """Find the ranks that passed a wrong size for another rank.

    Every call must have one size for each member of the group; otherwise return ().

    key     (name, members) of the group
    sides   each of the different calls, with the ranks that issued it

    An example: the size that rank 0 passed for rank 1 is wrong if rank 1 itself and all remaining members agree on
    another size. But if rank 1 alone differs in its own size, no rank is returned, because rank 1 can be right.
    """
    members = key[1]
    vector = {rank: side.call.sizes for side in sides for rank in side.ranks}
    if any(len(sizes) != len(members) for sizes in vector.values()):
        return ()

    def is_wrong(rank: int) -> bool:
        for i, owner in enumerate(members):
            if owner == rank or owner not in vector or vector[rank][i] == vector[owner][i]:
                continue
            remaining = [sizes[i] for other, sizes in vector.items() if other not in (rank, owner)]
            if remaining and all(size == vector[owner][i] for size in remaining):
                return True
        return False

    return tuple(sorted(rank for rank in vector if is_wrong(rank)))


def _changed(
    witnesses: Mapping[int, Witness], key: GroupKey, seq: int, sides: Sequence[CallVariant]
) -> tuple[int, ...]:
    """Find the ranks that did not pass the arguments that all members had passed to this collective before.

    The calls that now differ are compared with the earlier calls of the same group, layer and operation. Return () in
    each of these cases:

    - The calls that now differ are of several layers or operations.
    - The earlier calls had different arguments, or a member issued fewer than two earlier calls.
    - All ranks changed the arguments.

    key     (name, members) of the group
    seq     the sequence number of the calls that differ; earlier calls have lower numbers
    sides   each of the different calls, with the ranks that issued it
    """
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
