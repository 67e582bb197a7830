"""Whatever a trace does not show makes the verdict weaker, and never names another rank.

    HMR_SEEDS=2000 pytest -m full tests/verdict/simulated/test_knowledge.py          as many seeds as you have time for

In each simulated run one aspect is hidden, on all ranks and on one of them, and the run is judged again.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterable

import pytest
from drawn_case import FOREVER_NS
from faults import LATE, draw
from test_simulated import report, rest, truth

from repro.trace.knowledge import PLAN, Knows
from repro.verdict import Facts, Verdict, judge

FOUND = (4, 18, 19, 53, 97)
"""Seeds that named another rank, or another class, before the rules asked what a witness knows."""
UNDECLARED_HABITS = {"habit", "plan_swap"}
"""Faults in which a rank breaks with its own earlier steps as its schedule says. Without the schedule it is named."""
ASPECTS = [each for each in Knows if each is not Knows.LIVENESS]


def judged(case, sim) -> Verdict:
    facts = Facts(
        alive={rank: each.state != "dead" for rank, each in enumerate(sim.ranks)},
        lock_holders=case.lock_holders(sim),
    )
    return judge(sim.witnesses(), facts, num_ranks=case.num_ranks, now_ns=sim.clocks(2 * 10**9), quiet_window_s=1.0)


def check(aspect: Knows, seeds: Iterable[int]) -> None:
    for seed in seeds:
        case = draw(seed)
        whole = judged(case, rest(case))
        one = random.Random(seed).randrange(case.num_ranks)
        for ranks in (range(case.num_ranks), [one]):
            hidden = dict.fromkeys(ranks, aspect)
            sim = case.simulate(until_ns=FOREVER_NS // 2 if case.faults & {*LATE} else None, hidden=hidden)
            got = judged(case, sim)
            detail = f"{aspect} hidden on {list(ranks)}, judged {whole.verdict} {whole.culprits} with it"
            text = functools.partial(report, case, sim, truth(case, sim), got, detail)
            if not (case.faults & UNDECLARED_HABITS and aspect in PLAN and got.confidence == "likely"):
                assert set(got.culprits) <= set(whole.culprits), text()
            assert got.verdict in (whole.verdict, "inconclusive"), text()


@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda each: each.name)
def test_a_hidden_aspect_makes_the_verdict_weaker_and_names_nobody_else(aspect):
    check(aspect, FOUND)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("aspect", ASPECTS, ids=lambda each: each.name)
def test_no_hidden_aspect_of_hundreds_of_runs_names_anybody_else(aspect):
    check(aspect, range(int(os.environ.get("HMR_SEEDS", "300"))))
