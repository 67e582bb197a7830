"""Ranks that died or gave up: which of them is to blame, and which were ended by the backend for what others did."""

from __future__ import annotations

from collections.abc import Sequence

from repro.verdict.case import Case
from repro.verdict.explain import explain
from repro.verdict.result import Finding, Verdict, list_ranks, name_ranks
from repro.witness import Witness

LOOKS_S = 1.0
"""Events of two processes are in no order where they are noticed closer together than this: a watcher looks for its
processes twenty times a second, other hosts' lookouts twice."""


def victims(case: Case) -> set[int]:
    """Ranks that died or gave up with a collective pending whose arguments differ: the backend ended them for it."""
    gone = set(case.ranks("dead", "failed"))
    victims: set[int] = set()
    for key in case.ledger.diverged if gone else ():
        over = max(standing.left.get(key, 0) for standing in case.standings.values())
        for side in case.ledger.refused(key, over, max(case.ledger.diverged[key])):
            victims |= gone & set(side.ranks)
            victims |= {rank for rank in gone & set(key[1]) if not case.standings[rank].seen}
        for rank in gone & set(key[1]):  # the others may have completed what it died in
            standing = case.standings[rank]
            sides = case.ledger.refused(key, standing.left.get(key, 0), standing.issued.get(key, 0))
            victims |= {rank for side in sides if rank in side.ranks}
    return victims


def crash(case: Case) -> Verdict:
    """Somebody died or gave up; that others wait is the consequence."""
    dead, failed = case.ranks("dead"), case.ranks("failed")
    if victims(case):
        finding = explain(case.witnesses, case.standings, case.ledger, case.waits)
    elif dead and (unseen := _unseen_partners(case, dead)):
        finding = Finding("dead_rank", suspects=dead, confidence="undecided")
        finding.evidence.append(
            f"without a witness of {name_ranks(unseen)} it is not known whether arguments differed where they died"
        )
    elif dead and (never := _never_began(case)):
        finding = Finding("dead_rank", suspects=tuple(sorted({*dead, *never, *failed})), confidence="undecided")
        finding.evidence.append(
            f"{name_ranks(never)} never began, and nobody else is left: who died before its witness was open may have "
            "been the first, and the others have been ended for it"
        )
    elif dead:
        finding = _first_loss(case, dead, _on_their_own(case, failed))
    else:
        finding = _error(case, failed)
    if dead:
        finding.evidence.append(f"{name_ranks(dead)} died")
    for rank in failed:
        position = case.standings[rank].position
        finding.evidence.append(f"rank {rank}: {position.detail} ({position.line})")
    return case.verdict("crash", finding)


def _first_loss(case: Case, dead: Sequence[int], gave_up: Sequence[int]) -> Finding:
    """Who died first, unless somebody gave up on its own account clearly before that was noticed. Where it was at about
    the same time, to miss a peer is the likelier reason to give up than the reverse.
    """
    finding = _first_death(case, dead)
    if not gave_up:
        return finding
    since_s = min((case.now_s - case.facts.died[rank] for rank in dead if rank in case.facts.died), default=0.0)
    early = [rank for rank in gave_up if case.standings[rank].position.since_s > since_s + LOOKS_S]
    if len(early) < len(gave_up) or not case.facts.died:
        finding.suspects = tuple(sorted({*finding.suspects, *gave_up}))
        finding.confidence = "likely" if finding.culprits else "undecided"
        finding.evidence.append(f"{name_ranks(gave_up)} gave up too, and what came first was not seen")
        return finding
    finding = Finding("error", (min(early, key=lambda rank: _wall_ns(case.witnesses[rank])),), confidence="likely")
    finding.evidence.append(f"{name_ranks(early)} gave up before {name_ranks(dead)} was missed")
    return finding


def _first_death(case: Case, dead: Sequence[int]) -> Finding:
    """Of several dead ranks the one that was missed first; without an order each may have followed another."""
    missed_s = [case.facts.died.get(rank, float("-inf")) for rank in dead]
    first = tuple(rank for rank, when_s in zip(dead, missed_s, strict=True) if when_s == min(missed_s))
    if len(dead) == 1:
        return Finding("dead_rank", first)
    hosts = {case.standings[rank].host for rank in dead}
    ordered = len(first) == 1 and set(dead) <= case.facts.died.keys()
    if ordered and len(hosts) > 1:  # each host is looked at in its own time
        there = [case.facts.died[rank] for rank in dead if case.standings[rank].host != case.standings[first[0]].host]
        ordered = min(there, default=float("inf")) - min(missed_s) > LOOKS_S
    if not ordered:
        finding = Finding("dead_rank", suspects=tuple(dead), confidence="undecided")
        finding.evidence.append(f"which of {name_ranks(dead)} died first was not seen")
        return finding
    finding = Finding("dead_rank", first)
    finding.evidence.append(f"{name_ranks(first)} was gone first, {name_ranks(sorted({*dead} - {*first}))} later")
    return finding


def _never_began(case: Case) -> list[int]:
    """Ranks that did not come to open their witness, where no rank that did is left at work: a launcher ends all others
    when it loses one."""
    never = [rank for rank, witness in sorted(case.witnesses.items()) if not witness.who.pid]
    began = case.witnesses.keys() - set(never)
    return never if began and all(case.standings[rank].state in ("dead", "failed") for rank in began) else []


def _on_their_own(case: Case, failed: Sequence[int]) -> list[int]:
    """Of ranks that gave up those who did so on their own account: not in a wait for others that ended in an error, and
    not on a word that several were told alike."""
    alone = [rank for rank in failed if rank not in case.waits.at]
    told_alike = len({case.standings[rank].position.detail for rank in alone}) == 1
    return [] if told_alike and len(alone) > 1 else alone


def _error(case: Case, failed: Sequence[int]) -> Finding:
    """Nobody died."""
    alone = _on_their_own(case, failed)
    if alone:
        first = min(alone, key=lambda rank: _wall_ns(case.witnesses[rank]))
        return Finding("error", (first,), confidence="certain" if len(alone) == 1 else "likely")
    waited = {case.waits.at[rank].key: case.waits.at[rank] for rank in failed if rank in case.waits.at}
    absent = {rank for node in waited.values() for rank in node.lacks}
    finding = Finding("error", suspects=tuple(sorted(absent)), confidence="undecided")
    for node in waited.values():
        gone = [rank for rank in node.ranks if rank in failed]
        whom = f"waiting for {list_ranks(node.lacks)}" if node.lacks else "waiting for nobody"
        finding.evidence.append(f"{name_ranks(gone)} gave up in {node.name}, {whom}")
    if told := [rank for rank in failed if rank not in case.waits.at]:
        finding.evidence.append(f"{name_ranks(told)} gave up with the same words, which tell who is at fault if any do")
    return finding


def _wall_ns(witness: Witness) -> int:
    """When a rank last said something, on a clock that ranks of several hosts share as well as they can."""
    return witness.last_event_ns() + witness.who.wall_offset_ns


def _unseen_partners(case: Case, dead: Sequence[int]) -> list[int]:
    """Ranks without a whole witness that were, or may have been, in a collective with the dead when they died."""
    unseen = {rank for rank, standing in case.standings.items() if not standing.seen}
    if unseen & set(dead):
        return sorted(unseen)
    pending = {
        key
        for rank in dead
        for key, issued in case.standings[rank].issued.items()
        if issued > case.standings[rank].left.get(key, 0)
    }
    return sorted({rank for key in pending for rank in key[1]} & unseen)
