"""Judge a run in which ranks died or failed: find the rank that ended first.

If members of a group issued different collectives, the backend may have ended some of these ranks. A rank that the
backend ended is not the cause. If the user interrupted the ranks, no rank is the cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from repro.trace.knowledge import Knows
from repro.trace.witness.file import Witness
from repro.verdict.case import Case
from repro.verdict.result import Finding, Verdict, list_ranks, name_ranks
from repro.verdict.rules.explain import explain
from repro.verdict.rules.interrupt import interrupted, of_interrupt

ORDERING_RESOLUTION_S = 1.0
"""If the ends of two ranks were noticed within this time, it may be unknown which rank ended first: the watcher checks
the processes 20 times a second, but an agent on another host only twice a second."""

TIMEOUT_S = 10.0
"""If a rank died after it had waited for at least this time, a timeout of its backend may have ended it. No backend has
a shorter timeout."""


def victims(case: Case) -> set[int]:
    """Find the ranks that died or failed in a collective that members issued with different arguments.

    The backend may have ended these ranks because of the difference.
    """
    gone = set(case.ranks("dead", "failed"))
    victims: set[int] = set()
    for key in case.ledger.diverged if gone else ():
        over = max(rank_state.left.get(key, 0) for rank_state in case.rank_states.values())
        for side in case.ledger.refused(key, over, max(case.ledger.diverged[key]))[1]:
            victims |= gone & set(side.ranks)
            victims |= {rank for rank in gone & set(key[1]) if not case.rank_states[rank].seen}
        for rank in gone & set(key[1]):  # search also collectives that other ranks have completed
            rank_state = case.rank_states[rank]
            _, sides = case.ledger.refused(key, rank_state.left.get(key, 0), rank_state.issued.get(key, 0))
            victims |= {rank for side in sides if rank in side.ranks}
    return victims


def crash(case: Case) -> Verdict:
    """Judge a run in which a rank died or failed: `crash`. If other ranks wait, their wait is a consequence.

    The verdict is `inconclusive` if the user interrupted the ranks that ended first.
    """
    dead, failed = case.ranks("dead"), case.ranks("failed")
    verdict = "crash"
    if victims(case):
        finding = explain(case.witnesses, case.rank_states, case.ledger, case.waits)
    elif ranks := interrupted(case, ORDERING_RESOLUTION_S):
        verdict, finding = "inconclusive", of_interrupt(case, ranks)
    elif dead and (unseen := _unseen_partners(case, dead)):
        finding = Finding("dead_rank", suspects=dead, confidence="undecided")
        finding.evidence.append(
            f"{name_ranks(unseen)} left no witness that shows all arguments: they may have differed in the collective "
            f"where {name_ranks(dead)} died"
        )
    elif dead and (never := _never_began(case)):
        finding = Finding("dead_rank", suspects=tuple(sorted({*dead, *never, *failed})), confidence="undecided")
        finding.evidence.append(
            f"{name_ranks(never)} never began, and no other rank is left: it may have died before it opened its "
            "witness, and the launcher may then have ended the others"
        )
    elif len(dead) + len(failed) > 1 and not case.all_know(Knows.TIME):
        finding = Finding(suspects=tuple(sorted({*dead, *failed})), confidence="undecided")
        finding.evidence.append("not every witness has times, so nothing shows which rank ended first")
    elif dead:
        finding = _first_loss(case, dead, _on_their_own(case, failed))
    else:
        finding = _error(case, failed)
    if dead:
        finding.evidence.append(f"{name_ranks(dead)} died")
    for rank in failed:
        position = case.rank_states[rank].position
        finding.evidence.append(f"rank {rank}: {position.detail} ({position.line})")
    return case.verdict(verdict, finding)


def _first_loss(case: Case, dead: Sequence[int], failed: Sequence[int]) -> Finding:
    """Name the rank that died first; but if a rank certainly failed before the first death, name that rank.

    If the order is not clear, the death is more likely the cause than the failure, because a rank also fails when it
    loses another rank.

    failed   the failed ranks that `_on_their_own` returns
    """
    early: list[int] = []
    if set(dead) <= case.facts.died.keys():
        first_s = max(case.now_s - case.facts.died[rank] for rank in dead)
        early = [rank for rank in failed if case.rank_states[rank].position.since_s > first_s + ORDERING_RESOLUTION_S]
    if early:
        finding = Finding("error", (_first_to_fail(case, early),), confidence="likely")
        finding.evidence.append(f"{name_ranks(early)} failed before the death of {name_ranks(dead)} was noticed")
        return finding
    finding = _first_death(case, dead)
    if failed:
        finding.suspects = tuple(sorted({*finding.suspects, *failed}))
        finding.confidence = "likely" if finding.culprits else "undecided"
        finding.evidence.append(f"{name_ranks(failed)} failed too; the evidence does not show which came first")
    return finding


def _first_death(case: Case, dead: Sequence[int]) -> Finding:
    """Name the dead rank whose death was noticed first.

    If it is not clear which death was first, all dead ranks are suspects. If the first dead rank had waited for
    TIMEOUT_S or longer, a timeout of its backend may have ended it: then the suspects are this rank and the ranks for
    which it waited.
    """
    died = case.facts.died
    first = min(dead, key=lambda rank: died.get(rank, float("inf")))
    if len(dead) > 1:
        later = [rank for rank in dead if rank != first]

        def apart_s(rank: int) -> float:  # deaths on one host were noticed by one process, so their order is known
            return ORDERING_RESOLUTION_S if case.rank_states[rank].host != case.rank_states[first].host else 0.0

        ordered = set(dead) <= died.keys() and all(died[rank] - died[first] > apart_s(rank) for rank in later)
        if not ordered:
            finding = Finding("dead_rank", suspects=tuple(dead), confidence="undecided")
            finding.evidence.append(f"the evidence does not show which of {name_ranks(dead)} died first")
            return finding
    waited_s = case.rank_states[first].position.since_s - max(0.0, case.now_s - died.get(first, case.now_s))
    node = case.waits.at.get(first)
    if node is not None and waited_s >= TIMEOUT_S:
        finding = Finding("dead_rank", suspects=tuple(sorted({first, *node.waits_for})), confidence="undecided")
        finding.evidence.append(
            f"rank {first} had waited in {node.name} for {'' if first in died else 'up to '}{waited_s:.0f} s when it "
            "died: a timeout of the backend may have ended it"
        )
        return finding
    finding = Finding("dead_rank", (first,))
    if len(dead) > 1:
        finding.evidence.append(f"the death of rank {first} was noticed first, that of {name_ranks(later)} later")
    return finding


def _never_began(case: Case) -> list[int]:
    """Find the ranks that never opened their witness; [] unless all other ranks have died or failed.

    A rank that never opened its witness may have died first: a launcher that loses one rank ends all others.
    """
    never = [rank for rank, witness in sorted(case.witnesses.items()) if not witness.writer.pid]
    began = case.witnesses.keys() - set(never)
    return never if began and all(case.rank_states[rank].state in ("dead", "failed") for rank in began) else []


def _on_their_own(case: Case, failed: Sequence[int]) -> list[int]:
    """Find the ranks that were in no wait when they failed, and whose error message no other such rank has."""
    alone = [rank for rank in failed if rank not in case.waits.at]
    words = Counter(case.rank_states[rank].position.detail for rank in alone)
    return [rank for rank in alone if words[case.rank_states[rank].position.detail] == 1]


def _error(case: Case, failed: Sequence[int]) -> Finding:
    """Judge a run in which ranks failed and no rank died.

    Of the ranks that were not in a wait when they failed, take the first one. It is the culprit if no other of them has
    its error message. If another has it, or if all failed ranks were in a wait, there is no culprit. Then the suspects
    are the ranks that `_on_their_own` returns, and the ranks for which failed ranks waited.
    """
    alone = _on_their_own(case, failed)
    outside = [rank for rank in failed if rank not in case.waits.at]
    if alone and (first := _first_to_fail(case, outside)) in alone:
        since_s = case.rank_states[first].position.since_s
        earlier = [rank for rank in failed if case.rank_states[rank].position.since_s > since_s + ORDERING_RESOLUTION_S]
        return Finding("error", (first,), confidence="certain" if len(outside) == 1 and not earlier else "likely")
    nodes = {case.waits.at[rank].key: case.waits.at[rank] for rank in failed if rank in case.waits.at}
    absent = {rank for node in nodes.values() for rank in node.waits_for}
    finding = Finding("error", suspects=tuple(sorted({*absent, *alone})), confidence="undecided")
    for node in nodes.values():
        gone = [rank for rank in node.ranks if rank in failed]
        awaited = list_ranks(node.waits_for) if node.waits_for else "no rank"
        finding.evidence.append(f"{name_ranks(gone)} gave up in {node.name}, waiting for {awaited}")
    if alike := [rank for rank in outside if rank not in alone]:
        finding.evidence.append(
            f"{name_ranks(alike)} failed with the same message. Read the message: the order of these failures proves "
            "nothing"
        )
    return finding


def _first_to_fail(case: Case, failed: Sequence[int]) -> int:
    """Return the rank whose last event is the oldest. Times of different hosts are compared by their wall clocks."""
    return min(failed, key=lambda rank: _wall_ns(case.rank_states[rank].witness))


def _wall_ns(witness: Witness | None) -> int:
    return witness.last_event_ns() + witness.writer.wall_offset_ns if witness is not None else 0


def _unseen_partners(case: Case, dead: Sequence[int]) -> list[int]:
    """Find the ranks whose witnesses do not show with which arguments they entered their collectives.

    Such a rank may have caused a death: it may have entered a collective with other arguments than the dead rank.
    Return only members of the groups in which a dead rank had not completed a collective. But if the witness of a dead
    rank itself does not show the arguments, return all such ranks.
    """
    unseen = {rank for rank, rank_state in case.rank_states.items() if not rank_state.compares}
    if unseen & set(dead):
        return sorted(unseen)
    pending = {
        key
        for rank in dead
        for key, issued in case.rank_states[rank].issued.items()
        if issued > case.rank_states[rank].left.get(key, 0)
    }
    return sorted({rank for key in pending for rank in key[1]} & unseen)
