"""The verdict on ranks that left their schedule: nobody is named by what is lost, not comparable, or unrelated."""

from __future__ import annotations

import pytest
from scene import Scene
from serving import C1, EVERYONE, PLAN, STEP, combine, dispatch, eight_ranks, look, whole_step

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.trace.witness.format import Geometry


def entry(call: Collective) -> ScheduleEntry:
    return ScheduleEntry(call.group, call.op, call.layer)


def fill_strings(made: Scene, rank: int) -> None:
    """Leave no room for another string in the witness of a rank."""
    for length in (1000, 100, 10, 1):
        for number in range(20):
            made.recorders[rank].local("heartbeat", f"{number:02}".ljust(length, "x"))


@pytest.mark.parametrize("lost", ["call", "second part"])
def test_a_rank_whose_strings_are_lost_is_not_said_to_have_left_its_schedule(lost: str) -> None:
    """Its string area is full: the name of a collective, or of the rest of a schedule, reads as nothing."""
    made = eight_ranks(shape=Geometry(512, 512, 4_096, 16))
    whole_step(made, 1)
    if lost == "call":
        new = dispatch(7)
        plan = (entry(C1), entry(new), entry(dispatch(0)))
        made.begin_step(2, plan)
        made.all_of(EVERYONE, C1)
        fill_strings(made, 5)
        made.all_of(EVERYONE, new)
        made.enter(range(7), dispatch(0))
        made.enter([7], C1)
    else:
        made.begin_step(2, PLAN[:1])
        made.all_of(EVERYONE, C1)
        fill_strings(made, 5)
        made.begin_step(2, PLAN[1:-1])
        made.all_of(EVERYONE, dispatch(0))
        made.enter(range(7), combine(0))
        made.enter([7], C1)
    verdict = look(made)
    assert verdict.verdict == "deadlock" and set(verdict.culprits) <= {7}, verdict
    assert not any("rank 5" in line for line in verdict.evidence), verdict


def test_of_two_ranks_that_left_different_schedules_neither_is_known_to_be_the_first() -> None:
    """Places in two schedules cannot be compared once the schedules part."""
    made = Scene(4, {"dp": range(4), "ep": range(4), "tp": (2, 3)})
    made.phase("serve")
    local = [Collective("tp", "all_reduce", f"layers.{n}.attn", (4,), "float32", "sum") for n in range(3)]
    moe = Collective("ep", "all_reduce", "layers.9.mlp", (4,), "float32", "sum")
    last = Collective("ep", "all_reduce", "norm", (4,), "float32", "sum")
    short, long = [C1, moe, last], [C1, *local, moe, last]
    for rank in range(4):
        made.begin_step(1, [entry(call) for call in (short if rank < 2 else long)], ranks=[rank])
    made.all_of(range(4), C1)
    for call in local:
        made.all_of([2, 3], call)
    extra = Collective("dp", "all_reduce", "extra", (4,), "float32", "sum")
    made.enter([0], extra)  # in place 1 of its schedule
    made.enter([2], last)  # passed over place 4 of its schedule, which is place 1 of the other
    made.enter([1, 3], moe)
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (), "undecided"), verdict
    assert verdict.suspects == (0, 2), verdict


def test_a_rank_that_left_its_schedule_elsewhere_is_no_culprit_of_a_deadlock_that_it_has_no_part_in() -> None:
    """Ranks 0 and 1 wait for each other; rank 3 has issued one more in a group that neither is in."""
    made = Scene(4, {"a": (0, 1), "b": (0, 1), "c": (2, 3)})
    made.phase("serve")
    calls = {name: Collective(name, "all_reduce", "x", (4,), "float32", "sum") for name in "abc"}
    plans = {0: "ab", 1: "ba", 2: "c", 3: "c"}
    for rank, plan in plans.items():
        made.begin_step(1, [entry(calls[name]) for name in plan], ranks=[rank])
    made.all_of([2, 3], calls["c"])
    made.recorders[3].issue(calls["c"]._replace(layer="more"))
    made.enter([0], calls["a"])
    made.enter([1], calls["b"])
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (), "undecided"), verdict


def test_what_ranks_did_after_a_death_may_follow_from_it() -> None:
    """Rank 7 dies in a step; rank 5 loses its connection, goes on, and leaves the others in the step."""
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.all_of(EVERYONE, C1)
    died_s = made.now_ns / 1e9
    made.enter(range(7), dispatch(0))
    made.begin_step(3, PLAN, ranks=[5])
    made.enter([5], C1)
    verdict = look(made, alive={7: False}, died={7: died_s})
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (5,), "likely"), verdict
    assert verdict.suspects == (7,), verdict


def test_what_was_wrong_before_a_death_does_not_follow_from_it() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter([rank for rank in EVERYONE if rank != 5], C1)
    made.enter([5], dispatch(0))
    verdict = look(made, after_s=9.0, alive={7: False}, died={7: made.now_ns / 1e9 + 5})
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (5,), "certain"), verdict


def test_the_rank_that_left_a_shared_schedule_first_is_the_culprit() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter([0], Collective("dp", "all_reduce", "extra", (4,), "float32", "sum"))
    made.all_of([], STEP[1])
    made.enter(range(1, 7), dispatch(0))
    made.enter([7], combine(1))
    verdict = look(made)
    assert verdict.verdict == "deadlock" and verdict.culprits in ((), (0,)), verdict


def four_ranks() -> tuple[Scene, Collective, Collective]:
    """Four ranks whose steps have a collective of group dp, and then one of group ep."""
    made = Scene(4, {"dp": range(4), "ep": range(4)})
    made.phase("serve")
    ep = Collective("ep", "all_reduce", "layers.0.mlp", (4,), "float32", "sum")
    return made, C1, ep


def test_what_one_rank_may_still_issue_and_another_never_issued_in_its_step_was_skipped_by_both() -> None:
    made, first, second = four_ranks()
    plan = [entry(first), entry(second)]
    made.begin_step(1, plan)
    for call in (first, second):
        made.all_of(range(4), call)
    made.begin_step(2, plan)
    made.enter([0], second)
    assert look(made, after_s=0.1).cause != "skipped"
    made.recorders[1].issue(second)
    made.begin_step(3, plan, ranks=[1])
    made.enter([2, 3], first)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (0, 1)), verdict


def test_a_rank_that_ended_its_step_early_and_one_that_erred_later_did_not_do_the_same() -> None:
    """Rank 0 leaves out the last collective of step 1. Rank 3 issues one too many in step 2."""
    made, first, second = four_ranks()
    plan = [entry(first), entry(second)]
    made.begin_step(1, plan)
    made.all_of(range(4), first)
    made.enter([1, 2], second)
    made.recorders[3].issue(second)
    made.begin_step(2, plan, ranks=[0, 3])
    made.enter([0], first)
    made.enter([3], second._replace(layer="extra"))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (0,)), verdict
    assert "rank 0 ended step 1 without ep all_reduce of layers.0.mlp" in verdict.evidence, verdict
    assert any("rank 3 issued ep all_reduce of extra in step 2" in line for line in verdict.evidence), verdict


def test_a_rank_that_issued_two_collectives_the_wrong_way_round_is_not_said_to_have_left_one_out() -> None:
    """Rank 3 then leaves out the third collective of the step, for which the others wait."""
    made, first, second = four_ranks()
    third = second._replace(layer="norm")
    made.begin_step(1, [entry(second), entry(first), entry(third)])
    for call in (first, second):
        made.recorders[3].issue(call)
    for call in (second, first):
        made.all_of([0, 1, 2], call)
    made.enter([0, 1, 2], third)
    made.begin_step(2, [entry(first)], ranks=[3])
    made.enter([3], first)
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("deadlock", (3,)), verdict
    assert any(
        line.startswith("rank 3 issued dp all_reduce in step 1")
        and "where the schedule said ep all_reduce of layers.0.mlp, and issued that later" in line
        for line in verdict.evidence
    ), verdict


def test_the_ranks_that_changed_a_schedule_that_had_been_the_same_are_suspects_even_if_they_are_most_ranks() -> None:
    made, first, second = four_ranks()
    for step in (1, 2):
        made.begin_step(step, [entry(first), entry(second)])
        for call in (first, second):
            made.all_of(range(4), call)
    made.begin_step(3, [entry(second), entry(first)], ranks=[0, 1, 2])
    made.begin_step(3, [entry(first), entry(second)], ranks=[3])
    made.enter([0, 1, 2], second)
    made.enter([3], first)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "order", ()), verdict
    assert verdict.suspects == (0, 1, 2), verdict
    assert "ranks 0-2 changed a schedule that had been the same on all members" in verdict.evidence, verdict


def test_a_rank_that_left_its_schedule_a_step_after_another_rank_stopped_is_named() -> None:
    """Rank 0 waits in step 1 for a rank that is in step 2."""
    made, first, second = four_ranks()
    plan = [entry(first), entry(second)]
    made.begin_step(1, plan)
    made.all_of(range(4), first)
    made.enter([0], second)
    for rank in (1, 2, 3):
        made.recorders[rank].issue(second)
    made.begin_step(2, plan, ranks=[1, 2, 3])
    made.enter([1, 2], first)
    made.enter([3], second._replace(layer="extra"))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", (3,)), verdict
