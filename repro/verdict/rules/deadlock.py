"""Judge waits that can never end: a cycle of waits, or a wait for a rank that is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repro.verdict.case import Case
from repro.verdict.evidence.graph import Node
from repro.verdict.result import Verdict, list_ranks, name_ranks, say, shorten
from repro.verdict.rules.crash import ORDERING_RESOLUTION_S
from repro.verdict.rules.explain import explain


def deadlock(case: Case, cycle: Sequence[Node]) -> Verdict:
    """Judge waits that can never end.

    The verdict is `deadlock` if no rank has recorded an event for the quiet window, and `inconclusive` before that.

    cycle   the collectives and locks of the cycle of waits, each with the ranks that wait in it; or only one collective
            or lock, if ranks wait in it for a rank that is done
    """
    links = _links(cycle)
    lines = [
        f"{_sentence(node, link)} ({case.rank_states[node.ranks[0]].position.line})"
        for node, link in zip(cycle, links, strict=True)
    ]
    lines = shorten(lines)
    if not case.quiet:
        lines.append(f"{case.needs_quiet('deadlock')}: look again")
        return case.verdict("inconclusive", cycle=links, evidence=lines, confidence="undecided")
    finding = explain(case.witnesses, case.rank_states, case.ledger, case.waits)
    unseen = case.ranks("missing", "hidden")
    if unseen and finding.culprits:
        finding.evidence.append(f"{name_ranks(unseen)} left no usable witness and may have done the same")
        finding.confidence = "likely"
    if finding.culprits and (ended := _ended_before(case, finding.culprits)):
        finding.evidence.append(
            f"{name_ranks(ended)} died or failed, perhaps before the hang: then the hang is a consequence"
        )
        finding.suspects = tuple(sorted({*finding.suspects, *ended}))
        finding.confidence = "likely"
    return case.verdict("deadlock", finding, cycle=links, evidence=lines)


def _ended_before(case: Case, culprits: Sequence[int]) -> list[int]:
    """Find the ranks that possibly died or failed before a culprit reached the place where it is now.

    Such a rank, not the culprit, can be the real cause.
    """
    stopped_s = min(case.rank_states[rank].position.since_s for rank in culprits)
    ended = []
    for rank in case.ranks("dead", "failed"):
        died_s = case.facts.died.get(rank)
        since_s = case.rank_states[rank].position.since_s
        if case.rank_states[rank].state == "dead":
            since_s = float("inf") if died_s is None else case.now_s - died_s
        if rank not in culprits and since_s + ORDERING_RESOLUTION_S > stopped_s:
            ended.append(rank)
    return ended


def _sentence(node: Node, link: dict[str, Any]) -> str:
    if node.key[0] == "lock":
        return f"{say(node.ranks, 'wait')} for {node.name}, which {say(link['for'], 'hold')}"
    if not node.differs:
        return f"{say(node.ranks, 'wait')} in {node.name} for {list_ranks(link['for'])}"
    (group, _), seq = node.collective
    where = "it" if node.differs_at == seq else f"{group} #{node.differs_at} before it"
    sentence = f"{say(node.ranks, 'wait')} in {node.name}; {where} was issued with different arguments"
    return f"{sentence}, and {say(node.returned, 'completed it')}" if node.returned else sentence


def _links(cycle: Sequence[Node]) -> tuple[dict[str, Any], ...]:
    links = []
    for i, node in enumerate(cycle):
        following = cycle[(i + 1) % len(cycle)]
        awaited = sorted(node.waits_for & set(following.ranks)) or sorted(node.waits_for or node.cannot_return)
        links.append({"ranks": sorted(node.ranks), "waits_in": node.name, "for": awaited})
    return tuple(links)
