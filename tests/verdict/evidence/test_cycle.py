"""A cycle of waits is a chain in which each member waits for the next; there is none without one."""

from __future__ import annotations

import random

from repro.verdict.cycle import find_cycle


def test_each_member_of_the_cycle_waits_for_the_next():
    for seed in range(200):
        rng = random.Random(seed)
        edges = {n: rng.sample(range(12), rng.randint(0, 3)) for n in range(10)}
        cycle = find_cycle(edges)
        for member, awaited in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True):
            assert awaited in edges[member], (seed, edges, cycle)
        assert bool(cycle) == _loops(edges), (seed, edges, cycle)


def _loops(edges):
    """Whether a cycle is left when all members that wait for nobody are taken away, again and again."""
    left = {n: set(others) & edges.keys() for n, others in edges.items()}
    while ended := {n for n, others in left.items() if not others}:
        left = {n: others - ended for n, others in left.items() if n not in ended}
    return bool(left)


def test_a_chain_of_ten_thousand_has_no_cycle_until_its_end_waits_for_its_start():
    chain = {n: [n + 1] for n in range(10_000)}
    assert find_cycle(chain) == []
    assert len(find_cycle(chain | {10_000: [0]})) == 10_001
