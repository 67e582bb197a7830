"""Find the ranks that the user interrupted. Python raises KeyboardInterrupt after Ctrl-C, or another SIGINT.

torchrun also sends SIGINT to its ranks if the user presses Ctrl-C. So a rank that ends with KeyboardInterrupt has not
crashed.
"""

from __future__ import annotations

from repro.trace.knowledge import Knows
from repro.verdict.case import Case
from repro.verdict.result import Finding, list_ranks, name_ranks

_ERROR = "KeyboardInterrupt:"
"""How the error message of a failed rank begins if the rank was interrupted."""


def interrupted(case: Case, resolution_s: float) -> tuple[int, ...]:
    """Return the ranks that failed with KeyboardInterrupt; () if another rank possibly died or failed before them.

    Another rank possibly ended before them if its end was noticed more than ``resolution_s`` seconds before the first
    interrupt, or if the time of its end is not known. Any other end counts as a consequence of the interrupt.
    """
    failed = case.ranks("failed")
    ranks = tuple(rank for rank in failed if case.rank_states[rank].position.detail.startswith(_ERROR))
    dead, others = case.ranks("dead"), [rank for rank in failed if rank not in ranks]
    if not ranks or not (dead or others):
        return ranks
    if not case.all_know(Knows.TIME) or not set(dead) <= case.facts.died.keys():
        return ()
    ago_s = [case.rank_states[rank].position.since_s for rank in others]
    ago_s += [case.now_s - case.facts.died[rank] for rank in dead]
    first_s = max(case.rank_states[rank].position.since_s for rank in ranks)
    return ranks if max(ago_s) <= first_s + resolution_s else ()


def of_interrupt(case: Case, ranks: tuple[int, ...]) -> Finding:
    """Return a finding without a culprit: which ranks were interrupted, and for which ranks these waited."""
    finding = Finding(confidence="undecided")
    were = "was" if len(ranks) == 1 else "were"
    finding.evidence.append(
        f"{name_ranks(ranks)} {were} interrupted (KeyboardInterrupt: Ctrl-C or SIGINT): not a fault of the job"
    )
    for node in {case.waits.at[rank].key: case.waits.at[rank] for rank in ranks if rank in case.waits.at}.values():
        waited = [rank for rank in node.ranks if rank in ranks]
        awaited = list_ranks(node.waits_for) if node.waits_for else "no rank"
        finding.evidence.append(f"{name_ranks(waited)} waited in {node.name} for {awaited} at the interrupt")
    return finding
