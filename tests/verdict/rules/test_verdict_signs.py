"""The verdict and what the systems say: signs of life, starved machines, evidence that contradicts or does not come."""

from __future__ import annotations

from typing import Any

import pytest
from scene import Scene
from serving import C1, EVERYONE, PLAN, dispatch, eight_ranks, look, whole_step

from repro.verdict import Verdict


def all_in_one() -> Scene:
    """Every rank waits in the first dispatch of a step."""
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(EVERYONE, dispatch(0))
    return made


def one_behind() -> Scene:
    """Rank 7 has not come to the agreement of the second step."""
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter(range(7), C1)
    return made


def said(verdict: Verdict) -> str:
    return " ".join(verdict.evidence)


@pytest.mark.parametrize("after_s", [2.0, 600.0])
def test_a_collective_in_which_ranks_use_processors_moves_data_and_is_no_stall(after_s: float) -> None:
    moving = look(all_in_one(), after_s=after_s, cores={2: 0.4, 3: 0.07})
    assert (moving.verdict, moving.confidence) == ("inconclusive", "undecided"), moving
    assert "ranks 2,3 keep up to 0.40 processors busy" in said(moving), moving
    still = look(all_in_one(), after_s=after_s, cores=dict.fromkeys(EVERYONE, 0.03))
    assert (still.verdict, still.confidence) == ("stall", "certain"), still


def test_a_rank_that_spins_for_its_device_does_not_show_that_a_queued_collective_moves() -> None:
    verdict = look(all_in_one(), cores=dict.fromkeys(EVERYONE, 1.0), queued=("ep",))
    assert verdict.verdict == "stall", verdict


def test_a_stall_against_which_a_dump_speaks_is_inconclusive_however_long_it_takes() -> None:
    against = {0: "the Flight Recorder has nothing pending"}
    for after_s in (2.0, 600.0):
        verdict = look(all_in_one(), after_s=after_s, contradicted=against)
        assert (verdict.verdict, verdict.confidence) == ("inconclusive", "undecided"), verdict
        assert "rank 0: the Flight Recorder has nothing pending, which contradicts its witness" in said(verdict)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"unanswered": {0: "stack", 3: "stack"}}, "ranks 0,3 left no stack"),
        ({"starved": {3: 0.4}}, "lacked a processor for 40%"),
    ],
)
def test_a_stall_on_a_machine_too_busy_to_answer_takes_ten_windows_and_is_likely(
    facts: dict[str, Any], words: str
) -> None:
    soon, late = look(all_in_one(), **facts), look(all_in_one(), after_s=11, **facts)
    assert (soon.verdict, soon.confidence) == ("inconclusive", "undecided"), soon
    assert (late.verdict, late.confidence) == ("stall", "likely"), late
    assert words in said(soon) and words in said(late)


@pytest.mark.parametrize("starved", [{7: 0.8}, {0: 0.9}])
def test_a_slow_rank_is_not_certain_where_those_who_wait_or_are_waited_for_lacked_a_processor(
    starved: dict[int, float],
) -> None:
    """A few hundredths of a processor are no sign of life on such a machine, nor is a wait one of patience."""
    verdict = look(one_behind(), cores=dict.fromkeys(EVERYONE, 0.02), starved=starved)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("slow", (7,), "likely"), verdict
    assert "lacked a processor" in said(verdict), verdict
    calm = look(one_behind(), cores={7: 0.5}, starved={7: 0.01})
    assert (calm.verdict, calm.confidence) == ("slow", "certain"), calm


def test_a_rank_of_which_nothing_shows_that_it_works_is_only_likely_to_be_slow() -> None:
    for facts in ({}, {"alive": {7: True}}, {"cores": {7: 0.0}}):
        verdict = look(one_behind(), **facts)
        assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("slow", (7,), "likely"), verdict
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(range(6), C1)
    both = look(made, cores={6: 0.9, 7: 0.0})
    assert (both.culprits, both.confidence) == ((6, 7), "likely"), both
    assert "rank 7 used no processor" in said(both), both
    stopped = look(one_behind(), excused={7: "stopped by a signal"}, cores={7: 0.0})
    assert (stopped.culprits, stopped.confidence) == ((7,), "certain"), stopped


def test_of_several_ranks_that_run_those_that_may_wait_for_their_device_are_only_suspects() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.all_of(EVERYONE, dispatch(0))
    made.enter(range(6), C1)
    made.recorders[6].local("build_begin", "gdn")
    verdict = look(made, queued=("ep",), cores={6: 0.9, 7: 0.0})
    assert (verdict.verdict, verdict.culprits, verdict.suspects) == ("slow", (6,), (7,)), verdict


def test_a_stall_of_one_group_is_none_while_another_group_moves_data() -> None:
    made = Scene(4, {"a": (0, 1), "b": (2, 3)})
    for name, ranks in (("a", (0, 1)), ("b", (2, 3))):
        made.enter(ranks, C1._replace(group=name))
    assert look(made, cores={3: 0.5}).verdict == "inconclusive"
    assert look(made).verdict == "stall"
