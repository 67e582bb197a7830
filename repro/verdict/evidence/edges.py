"""Convert the wait-for graph to `Verdict.waits`: which ranks wait where, for which ranks, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from repro.verdict.evidence.graph import Node, Waits
from repro.verdict.evidence.position import RankState
from repro.verdict.result import Wait, say

MOST_RANKS = 1 << 20
"""The largest number of ranks in all waits of a verdict together. Further waits are left out, to limit verdict.json."""


def list_waits(waits: Waits, rank_states: Mapping[int, RankState]) -> tuple[Wait, ...]:
    """Return a `Wait` for each collective and lock in which a living rank waits. The waits of a cycle come first.

    waits        the wait-for graph
    rank_states  rank -> what the rank does, and which collectives it issued
    """
    ordered = {node.key: node for node in (*waits.cycle, *waits.nodes.values())}
    listed: list[Wait] = []
    num_ranks = 0
    for node in ordered.values():
        ranks = sorted(rank for rank in node.ranks if rank_states[rank].state in ("blocked", "locked"))
        if not ranks:
            continue
        awaited = sorted(node.waits_for | node.cannot_return | node.unknown)
        num_ranks += len(ranks) + len(awaited)
        if num_ranks > MOST_RANKS:
            break
        reasons = _lock_reasons(node) if node.key[0] == "lock" else _collective_reasons(node, rank_states)
        listed.append(Wait(tuple(ranks), node.name, tuple(awaited), "; ".join(reasons)))
    return tuple(listed)


def _lock_reasons(node: Node) -> Iterator[str]:
    if node.waits_for:
        yield say(node.waits_for, "hold it")
    if node.cannot_return:
        yield say(node.cannot_return, "hold it and cannot go on")
    if node.outside == 0:
        yield "no process holds it any more"
    elif node.outside is not None:
        yield f"process {node.outside}, which is no rank, holds it" if node.outside > 0 else "its holder is not known"


def _collective_reasons(node: Node, rank_states: Mapping[int, RankState]) -> Iterator[str]:
    key, seq = node.collective
    seen = node.waits_for - node.unknown
    absent = {rank for rank in seen if rank_states[rank].issued.get(key, 0) < seq}
    if absent:
        yield say(absent, "have not issued it")
    if node.differs:
        which = "it" if node.differs_at == seq else f"#{node.differs_at} before it"
        yield f"{which} was issued with different {'sizes' if node.differs == 'sizes' else 'arguments'}"
    elif gave_up := seen - absent:
        yield say(gave_up, "have issued it and gave it up")
    if node.cannot_return:
        yield say(node.cannot_return, "have issued it and cannot go on")
    if node.unknown:
        yield say(node.unknown, "left no whole witness")
    if node.is_complete:  # a broadcast needs only its root; members that only receive may be missing
        others = (rank_states[member] for member in key[1] if member in rank_states)
        missing = any(state.issued.get(key, 0) < seq for state in others)
        yield "every member that it needs has issued it" if missing else "every member has issued it"
