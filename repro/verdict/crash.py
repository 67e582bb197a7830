"""Ranks that died or gave up: which of them is to blame, and which were ended by the backend for what others did."""

from __future__ import annotations

from collections.abc import Sequence

from repro.verdict.case import Case
from repro.verdict.explain import explain
from repro.verdict.result import Finding, Verdict, name_ranks
from repro.witness import Witness


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
        finding = Finding("dead_rank", suspects=tuple(sorted({*dead, *never})), confidence="undecided")
        finding.evidence.append(
            f"{name_ranks(never)} never began, and nobody else is left: who died before its witness was open may have "
            "been the first, and the others have been ended for it"
        )
    elif dead:
        finding = _first_death(case, dead)
    else:
        finding = _error(case, failed)
    if dead:
        finding.evidence.append(f"{name_ranks(dead)} died")
    for rank in failed:
        position = case.standings[rank].position
        finding.evidence.append(f"rank {rank}: {position.detail} ({position.line})")
    return case.verdict("crash", finding)


def _first_death(case: Case, dead: Sequence[int]) -> Finding:
    """Of several dead ranks the one that was missed first; without an order each may have followed another."""
    missed_s = [case.died.get(rank, float("-inf")) for rank in dead]
    first = tuple(rank for rank, when_s in zip(dead, missed_s, strict=True) if when_s == min(missed_s))
    if len(dead) == 1:
        return Finding("dead_rank", first)
    if len(first) > 1 or not set(dead) <= case.died.keys():
        finding = Finding("dead_rank", suspects=tuple(dead), confidence="undecided")
        finding.evidence.append(f"which of {name_ranks(dead)} died first was not seen")
        return finding
    finding = Finding("dead_rank", first)
    finding.evidence.append(f"{name_ranks(first)} was gone first, {name_ranks(sorted({*dead} - {*first}))} later")
    return finding


def _never_began(case: Case) -> list[int]:
    """Ranks that did not come to open their witness, where no rank that did is left alive: a launcher ends all others
    when it loses one."""
    never = [rank for rank, witness in sorted(case.witnesses.items()) if not witness.who.pid]
    began = case.witnesses.keys() - set(never)
    return never if began and all(case.standings[rank].state == "dead" for rank in began) else []


def _error(case: Case, failed: Sequence[int]) -> Finding:
    """Who gave up on its own account: not those whose wait for others ended in an error, and of those who were all
    told the same nobody."""
    alone = [rank for rank in failed if rank not in case.waits.at]
    if not alone:
        absent = sorted({rank for gone in failed for rank in case.waits.at[gone].lacks})
        finding = Finding("error", suspects=tuple(absent), confidence="undecided")
        who = f"for which {name_ranks(absent)} had not come" if absent else "to which all had come"
        finding.evidence.append(f"{name_ranks(failed)} gave up inside a collective {who}")
        return finding
    if len(alone) > 1 and len({case.standings[rank].position.detail for rank in alone}) == 1:
        finding = Finding("error", confidence="undecided")
        finding.evidence.append(
            f"{name_ranks(alone)} gave up with the same words: they tell who is at fault, if any do"
        )
        return finding
    first = min(alone, key=lambda rank: _wall_ns(case.witnesses[rank]))
    return Finding("error", (first,), confidence="certain" if len(alone) == 1 else "likely")


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
