"""overhead.py: from the times of steps to the cost of the recorder."""

from __future__ import annotations

import random

import overhead
import pytest


def rows_of(num_steps: int, cost: float, seed: int = 0, noise: float = 0.1, drift: float = 0.0) -> list[overhead.Row]:
    """The rows that a worker writes for its first steps. cost: of a recorded step, as a share of a step."""
    draw = random.Random(seed)
    rows = []
    for step in range(num_steps):
        on = overhead.is_recorded(step)
        step_ns = int(2e7 * (1 + drift * step) * (1 + cost * on) * draw.lognormvariate(0, noise))
        rows.append((step, int(on), step_ns, step_ns // 2))
    return rows


@pytest.mark.parametrize("cost", [0.0, 0.005, 0.03])
def test_the_interval_holds_the_cost_also_on_a_machine_that_becomes_slower(cost):
    pairs = overhead.pairs_of([rows_of(2000, cost, seed, drift=0.001) for seed in (0, 1)], 2)
    assert len(pairs) == 1000
    mean, low, high = overhead.interval(pairs)
    assert low <= cost <= high and low <= mean <= high and high - low < 0.03, (low, mean, high)


def test_noise_alone_is_no_cost():
    mean, low, high = overhead.interval(overhead.pairs_of([rows_of(4000, 0.0, seed, noise=0.4) for seed in (2, 3)], 3))
    assert abs(mean) < 0.02 and low < 0 < high, (low, mean, high)


def test_half_of_the_steps_are_recorded_and_the_order_within_a_pair_varies():
    steps = [overhead.is_recorded(step) for step in range(400)]
    assert all(first != second for first, second in zip(steps[::2], steps[1::2], strict=True))
    assert 60 < sum(steps[::2]) < 140


def test_only_pairs_of_steps_that_all_ranks_have_are_compared():
    first, second = rows_of(100, 0.0), rows_of(100, 0.0)
    del first[31], second[80]
    assert len(overhead.pairs_of([first, second], 2)) == 48
