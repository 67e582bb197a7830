"""Judge waits in a collective that every member has issued: `stall`, unless the collective can still end."""

from __future__ import annotations

from collections.abc import Sequence

from repro.trace.knowledge import Knows
from repro.verdict.case import Case
from repro.verdict.evidence.graph import Node
from repro.verdict.evidence.ledger import worst_difference
from repro.verdict.evidence.sides import calls_of_sides
from repro.verdict.result import MOST_SENTENCES, Finding, Verdict, name_ranks, say, shorten
from repro.verdict.rules.slow import STARVED, signs_of_life, slow

MOVES = 0.05
"""A rank in a collective may be moving data if it keeps at least this many processors busy. A rank that only waits uses
far less."""

PATIENT_WINDOWS = 10
"""If ranks lacked a processor, or requested stacks or dumps are missing, a stall is reported only after this many quiet
windows."""


def attended(case: Case) -> Verdict:
    """Judge waits in collectives that every member has issued and none has completed: `stall` or `inconclusive`.

    The verdict is `stall` if the quiet window has passed, the witnesses of all members are complete and show the
    arguments, and nothing else explains the wait or shows progress. Otherwise it is `inconclusive`.
    """
    nodes = case.waits.attended
    names = ", ".join(node.name for node in nodes[:MOST_SENTENCES])
    unseen = sorted({rank for node in nodes for rank in node.collective[0][1] if not case.rank_states[rank].seen})
    if unseen:
        line = f"every member has issued {names}, but {say(unseen, 'have')} no complete witness to compare with"
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    members = sorted({rank for node in nodes for rank in node.collective[0][1]})
    if blind := case.unknowing(members, Knows.ARGUMENTS):
        line = f"every member has issued {names}, but the witness of {name_ranks(blind)} does not show its arguments"
        return case.verdict("inconclusive", evidence=[line], confidence="undecided")
    if moves := [line for node in nodes for line in _moves(case, node)]:
        return case.verdict("inconclusive", evidence=shorten(moves), confidence="undecided")
    if not case.quiet:
        return case.verdict("inconclusive", evidence=[case.needs_quiet("stall")], confidence="undecided")
    doubts = _doubts(case, members)
    if doubts and case.quiet_s < PATIENT_WINDOWS * case.quiet_window_s:
        text = f"every member has issued {names}, and nothing has happened for {case.quiet_s:.1f} s"
        needed = f"a stall is reported only after {PATIENT_WINDOWS} quiet windows"
        return case.verdict("inconclusive", evidence=[text, *doubts, needed], confidence="undecided")
    differing = Finding(confidence="undecided")
    if differs := _differ_elsewhere(case, differing):
        text = f"every member has issued {names}, and nothing has happened for {case.quiet_s:.1f} s"
        differing.evidence = [text, *differs, *doubts]
        return case.verdict("inconclusive", differing)
    lines = [f"every member has issued {node.name} and none has left it: a device or network stall" for node in nodes]
    for node in nodes:
        key, seq = node.collective
        if seq in case.ledger.diverged.get(key, ()) and worst_difference(case.ledger.sides(key, seq)) == "place":
            lines.append(f"the members did not issue {node.name} for the same layer and step")
    finding = Finding(evidence=shorten(lines))
    doubts += shorten([line for node in nodes for line in _pending_elsewhere(case, node)])
    finding.evidence += doubts
    finding.confidence = "likely" if doubts else "certain"
    return case.verdict("stall", finding)


def _differ_elsewhere(case: Case, finding: Finding) -> list[str]:
    """Describe collectives that ranks issued with different arguments, although no rank waits in them.

    Such a collective can be the cause, because on a device it can block the collectives after it. If
    ``finding.first_divergence`` is not set, set it to the different calls of the first such collective.
    """
    lines = []
    for key, seqs in sorted(case.ledger.diverged.items()):
        sides = case.ledger.sides(key, min(seqs))
        if worst_difference(sides) in ("mismatch", "sizes"):
            lines.append(f"{key[0]} #{min(seqs)} was issued with different arguments and may be the cause")
            finding.first_divergence = finding.first_divergence or calls_of_sides((key, min(seqs), sides))
    return shorten(lines)


def left_by_some(case: Case) -> Verdict:
    """Judge waits in a collective that every member has issued and some have completed: `slow` or `inconclusive`.

    The verdict is `slow` if a member that still waits shows signs of work, or lacked a processor. Otherwise it is
    `inconclusive`, because the witness of this member may be out of date.
    """
    lines: list[str] = []
    ranks: set[int] = set()
    for node in case.waits.left_by_some:
        ranks.update(node.ranks)
        lines.append(f"{say(node.ranks, f'are in {node.name}')}, which {say(node.returned, 'have left')}")
    late = sorted(ranks)
    lines.append(f"{say(late, 'have')} not returned from it yet, or the witness is out of date. Take the stacks")
    starved = [rank for rank in late if case.facts.starved.get(rank, 0.0) >= STARVED]
    if starved or any(signs_of_life(case, rank) for rank in late):
        finding = slow(case, late)
        finding.confidence = "likely"
        finding.evidence = [*lines, *finding.evidence]
        return case.verdict("slow", finding)
    return case.verdict("inconclusive", Finding(suspects=tuple(late), confidence="undecided", evidence=lines))


def _moves(case: Case, node: Node) -> list[str]:
    """Return evidence against a stall, in sentences: the collective of ``node`` may still make progress, or a dump
    contradicts a witness.
    """
    (group, members), _ = node.collective
    lines = [
        f"rank {rank}: {case.facts.contradicted[rank]}, which contradicts its witness"
        for rank in members
        if rank in case.facts.contradicted
    ]
    if group in case.queued:  # a rank that waits for its GPU keeps a CPU core busy: CPU time shows no progress
        running = [rank for rank in members if case.rank_states[rank].state == "running"]
        if running:
            lines.append(
                f"{say(running, f'have queued {node.name}')} and did not wait for it: the device may have earlier work "
                "to do. Take the stacks, or a profile of the devices"
            )
        return lines
    busy = {rank: cores for rank in members if (cores := case.facts.cores.get(rank, 0.0)) >= MOVES}
    if busy:
        lines.append(
            f"every member has issued {node.name}, and {say(busy, 'keep')} up to {max(busy.values()):.2f} processors "
            "busy: the collective may be moving data. Look again, or take the stacks"
        )
    return lines


def _doubts(case: Case, members: Sequence[int]) -> list[str]:
    """Return reasons to report a stall only after a longer wait, and only as `likely`: a sentence for each reason.

    The reasons are members that lacked a processor, or that did not write the stacks or dumps that were requested.
    """
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
    """Describe, in sentences, members that issued the collective of ``node``, but do not wait in this collective now.

    On these members the collective may still make progress.
    """
    (_, members), _ = node.collective
    together: dict[str, list[int]] = {}
    for rank in members:
        if case.waits.at.get(rank) is node:
            continue
        if case.rank_states[rank].state == "done":
            words = f"are done and never waited for {node.name}"
        else:
            words = f"{'wait' if rank in case.waits.at else 'run'} {case.place(rank)} with {node.name} pending"
        together.setdefault(words, []).append(rank)
    return [say(ranks, words) for words, ranks in together.items()]
