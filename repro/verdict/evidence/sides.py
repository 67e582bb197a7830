"""Describe the place where ranks first differ, for verdict.json.

The description consists of sides. A side is a set of ranks: those that issued the same call, or those that are at the
same position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repro.verdict.evidence.graph import Node
from repro.verdict.evidence.ledger import CallVariant
from repro.verdict.evidence.position import GroupKey, RankState


def places(rank_states: Sequence[RankState]) -> list[dict[str, Any]]:
    places: dict[tuple[str, int, str, str, int, str], list[int]] = {}
    for rank_state in rank_states:
        at = rank_state.position
        places.setdefault((at.group, at.seq, at.op, at.layer, at.step, at.site), []).append(rank_state.rank)
    return [
        {"ranks": ranks, "group": group, "seq": seq, "op": op, "layer": layer, "step": step, "site": site}
        for (group, seq, op, layer, step, site), ranks in places.items()
    ]


def positions(cycle: Sequence[Node], rank_states: Mapping[int, RankState]) -> dict[str, Any] | None:
    sides = [place for node in cycle for place in places([rank_states[rank] for rank in node.ranks])]
    return {"sides": sides} if sides else None


def calls_of_sides(divergence: tuple[GroupKey, int, list[CallVariant]]) -> dict[str, Any]:
    """Return the field ``first_divergence`` of verdict.json for a collective that ranks issued differently.

    It has one side for each of the different calls: the ranks that issued this call, and the arguments of the call.

    divergence   (group, sequence number, the different calls)
    """
    key, seq, sides = divergence
    return {
        "sides": [
            {
                "ranks": list(side.ranks), "group": key[0], "seq": seq, "op": side.call.signature.op,
                "layer": side.call.signature.layer, "step": side.call.step, "site": side.site,
                "sizes": list(side.call.sizes), "dtype": side.call.signature.dtype,
                "reduce_op": side.call.signature.reduce_op, "root": side.call.root,
            }
            for side in sides
        ]
    }  # fmt: skip
