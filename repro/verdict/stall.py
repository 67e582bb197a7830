"""Collectives that every member has issued: a stall, unless something says that they move or that a view is stale."""

from __future__ import annotations

from repro.verdict.case import Case
from repro.verdict.graph import Node
from repro.verdict.ledger import widest
from repro.verdict.result import Finding, Verdict, name_ranks, say
from repro.verdict.slow import STARVED, signs_of_life, slow

MOVES = 0.05
"""Processors that a rank keeps busy inside a collective that moves bytes; one that only waits uses far fewer."""

PATIENT_WINDOWS = 10
"""Quiet windows that a collective gets on a machine without a free processor, or without the evidence asked for."""


def attended(case: Case) -> Verdict:
    """Judge a wait that ends in a collective which every member has issued and none has left."""
    node = case.waits.attended[0]
    unseen = [rank for rank in node.collective[0][1] if not case.standings[rank].seen]
    if unseen:
        line = f"every member has issued {node.name}, but {say(unseen, 'have')} no whole witness to compare with"
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    if moves := _moves(case, node):
        return case.verdict("inconclusive", evidence=moves, confidence="undecided")
    if not case.quiet:
        text = f"the last event is {case.quiet_s:.3f} s old, {case.quiet_window_s:g} s of quiet are needed"
        return case.verdict("inconclusive", evidence=[text], confidence="undecided")
    doubts = _doubts(case, node)
    if doubts and case.quiet_s < PATIENT_WINDOWS * case.quiet_window_s:
        text = f"every member has issued {node.name}, and nothing has happened for {case.quiet_s:.1f} s"
        needed = f"it takes {PATIENT_WINDOWS} quiet windows to call that a stall"
        return case.verdict("inconclusive", evidence=[text, *doubts, needed], confidence="undecided")
    absent = _pending_elsewhere(case, node)
    lines = [f"every member has issued {node.name} and none has left it: a device or network stall", *absent]
    key, seq = node.collective
    if seq in case.ledger.diverged.get(key, ()) and widest(case.ledger.sides(key, seq)) == "place":
        lines.append("they do not issue it for the same layer and step")
    return case.verdict("stall", evidence=[*lines, *doubts], confidence="likely" if doubts or absent else "certain")


def left_by_some(case: Case) -> Verdict:
    """Judge a wait that ends in a collective which every member has issued, and which some have left.

    The others are about to return from it, or their witness is older than that of those who left.
    """
    lines: list[str] = []
    ranks: set[int] = set()
    for node in case.waits.left_by_some:
        ranks.update(node.ranks)
        lines.append(f"{say(node.ranks, f'are in {node.name}')}, which {say(node.returned, 'have left')}")
    late = sorted(ranks)
    lines.append(f"{name_ranks(late)} did not return from it yet, or the witness is out of date: take the stacks")
    starved = [rank for rank in late if case.facts.starved.get(rank, 0.0) >= STARVED]
    if starved or any(signs_of_life(case, rank) for rank in late):
        finding = slow(case, late)
        finding.confidence = "likely"
        finding.evidence = [*lines, *finding.evidence]
        return case.verdict("slow", finding)
    return case.verdict("inconclusive", Finding(suspects=tuple(late), confidence="undecided", evidence=lines))


def _moves(case: Case, node: Node) -> list[str]:
    """What shows that a collective goes on: it is no stall then, however long it takes."""
    (group, members), _ = node.collective
    lines = [
        f"rank {rank}: {case.facts.contradicted[rank]}, which contradicts its witness"
        for rank in members
        if rank in case.facts.contradicted
    ]
    if group in case.queued:  # a rank that waits for its device keeps a processor busy
        running = [rank for rank in members if case.standings[rank].state == "running"]
        if running:
            lines.append(
                f"{say(running, f'have queued {node.name}')} and did not wait for it: the device may have work to do "
                "before it; look at what the devices have pending"
            )
        return lines
    busy = {rank: cores for rank in members if (cores := case.facts.cores.get(rank, 0.0)) >= MOVES}
    if busy:
        lines.append(
            f"every member has issued {node.name}, and {say(busy, 'keep')} up to {max(busy.values()):.2f} processors "
            "busy: it may move data; look again, or take the stacks"
        )
    return lines


def _doubts(case: Case, node: Node) -> list[str]:
    """What speaks against a stall for as long as it is young."""
    (_, members), _ = node.collective
    facts = case.facts
    lines = []
    starved = max((facts.starved.get(rank, 0.0) for rank in members), default=0.0)
    if starved >= STARVED:
        lines.append(f"ranks lacked a processor for {starved:.0%} of the time")
    silent: dict[str, list[int]] = {}
    for rank in members:
        if rank in facts.unanswered:
            silent.setdefault(facts.unanswered[rank], []).append(rank)
    return lines + [f"{name_ranks(ranks)} left no {what}" for what, ranks in silent.items()]


def _pending_elsewhere(case: Case, node: Node) -> list[str]:
    """Members that issued the collective and do not wait in it: nothing shows whether their part of it goes on."""
    (_, members), _ = node.collective
    together: dict[str, list[int]] = {}
    for rank in members:
        if case.waits.at.get(rank) is node:
            continue
        if case.standings[rank].state == "done":
            words = f"are done and never waited for {node.name}"
        else:
            words = f"{'wait' if rank in case.waits.at else 'run'} {case.place(rank)} with {node.name} pending"
        together.setdefault(words, []).append(rank)
    return [say(ranks, words) for words, ranks in together.items()]
