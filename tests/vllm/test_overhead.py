"""overhead.py: from the times of steps to the cost of the recorder."""

from __future__ import annotations

import random

import overhead
import pytest


def rows_of(num_blocks: int, cost: float, seed: int = 0, noise: float = 0.1, drift: float = 0.0) -> list[overhead.Row]:
    """The rows that a worker writes for its first blocks. cost: of a recorded step, as a share of a step."""
    draw = random.Random(seed)
    rows = []
    for block in range(num_blocks):
        on = overhead.is_recorded(block)
        for _ in range(overhead.BLOCK - 2):
            step_ns = int(2e7 * (1 + drift * block) * (1 + cost * on) * draw.gauss(1, noise))
            rows.append((int(on), step_ns, step_ns // 2))
    return rows


@pytest.mark.parametrize("cost", [0.0, 0.005, 0.03])
def test_the_interval_holds_the_cost_also_on_a_machine_that_becomes_slower(cost):
    lines = [rows_of(8, cost, line, drift=0.01) for line in range(60)]
    pairs = [pair for rows in lines for pair in overhead.pairs_of(rows, 1)]
    assert len(pairs) == 240
    mean, low, high = overhead.interval(pairs)
    assert low <= cost <= high and low <= mean <= high and high - low < 0.03, (low, mean, high)


def test_half_of_the_blocks_are_recorded_and_the_order_within_a_pair_varies():
    blocks = [overhead.is_recorded(block) for block in range(400)]
    assert all(first != second for first, second in zip(blocks[::2], blocks[1::2], strict=True))
    assert 60 < sum(blocks[::2]) < 140


def test_rows_whose_blocks_are_not_in_pairs_are_refused():
    rows = [row for row in rows_of(8, 0.0) if row[0]]
    with pytest.raises(ValueError, match="both recorded"):
        overhead.pairs_of(rows, 1)
