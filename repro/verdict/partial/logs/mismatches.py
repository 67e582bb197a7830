"""Judge the comparison that TORCH_DISTRIBUTED_DEBUG=DETAIL makes before each collective."""

from __future__ import annotations

from collections import Counter

from repro.trace.observed import Call
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.scene import Scene
from repro.verdict.partial.words import arguments, ranks_of


def judge_mismatches(scene: Scene) -> Diagnosis | None:
    """Each rank names itself and the first rank that differs from it, so who is named often is no more than that."""
    if not scene.mismatches:
        return None
    calls: dict[int, Call] = {}
    for row in scene.mismatches:
        calls.setdefault(row.rank, row.call)
        if row.other is not None and row.other_call is not None:
            calls.setdefault(row.other, row.other_call)
    sides: dict[tuple[object, ...], list[int]] = {}
    for rank, call in sorted(calls.items()):
        sides.setdefault((call.seq, *call.arguments), []).append(rank)
    ordered = sorted(sides.values(), key=len)
    few = tuple(ordered[0]) if len(ordered) > 1 and len(ordered[0]) < len(ordered[-1]) else ()
    evidence = [
        f"{ranks_of(ranks).capitalize()}: {arguments(calls[ranks[0]])}, sequence number "
        f"{calls[ranks[0]].seq} ({calls[ranks[0]].source})"
        for ranks in ordered
    ]
    counted = Counter(row.other for row in scene.mismatches if row.other is not None)
    if counted:
        evidence.append(
            "Each report names its own rank and the first one that differs from it: to be named "
            "often is no proof of who is right."
        )
    if few:
        evidence.append(f"{ranks_of(few).capitalize()} stands out, which makes a suspect and no more.")
    ops = {calls[ranks[0]].op for ranks in ordered}
    numbers = {calls[ranks[0]].seq for ranks in ordered}
    return Diagnosis(
        "crash", "mismatch" if len(ops) > 1 or len(numbers) > 1 else "sizes", (), few, "likely",
        ("The ranks entered one collective with different "
        f"{'operations' if len(ops) > 1 else 'shapes (sizes)'}. DETAIL refused it before it could "
        "hang.",),
        tuple(evidence), ("The reports are of different collectives: compare their sequence numbers.",),
        ("why the ranks built different graphs: print on each rank the parameters (buckets) that "
        "take part, frozen or unused ones, and the batch; with its stack",),
    )  # fmt: skip
