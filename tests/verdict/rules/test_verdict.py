"""The verdict on scenes small enough to be read: deadlocks of the order, slow, stall, corrupt and clean."""

from __future__ import annotations

import re

import pytest
from scene import Scene
from serving import C1, EVERYONE, EXTRA, PLAN, SIZES, dispatch, eight_ranks, look, metadata_rebuild, whole_step
from written import written

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.witness.format import RECORD, Event, Kind


def test_extra_collective_of_the_live_ranks_is_a_deadlock_with_exactly_them_as_culprits() -> None:
    made = metadata_rebuild()
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", tuple(range(6)))
    assert verdict.confidence == "certain"
    assert verdict.sentence() == (
        "ranks 0-5 wait in dp all_reduce #6 (step 12, layers.0.linear_attn); "
        "ranks 6,7 wait in ep all_gather_v #9 (step 12, layers.0.mlp)"
    )
    assert {link["waits_in"] for link in verdict.cycle} == {"dp all_reduce #6", "ep all_gather_v #9"}
    live, idle = verdict.first_divergence["sides"]  # type: ignore[index]
    assert (live["ranks"], live["layer"], live["step"]) == (list(range(6)), "layers.0.linear_attn", 12)
    assert live["planned"] == "ep all_gather_v of layers.0.mlp"
    assert (idle["ranks"], idle["layer"]) == ([6, 7], "layers.0.mlp")
    assert "not in the schedule" in " ".join(verdict.evidence)
    for rank, position in enumerate(verdict.ranks):  # each rests on a record that can be looked up
        name, at, event = re.fullmatch(r"(.*):(\d+) event (\d+)", position.line).groups()  # type: ignore[union-attr]
        record = Event._make(RECORD.unpack_from(made.files[rank], int(at)))
        assert (name, int(event)) == (f"rank{rank:03d}.wit", record.n)
        assert (record.kind, record.seq, record.step) == (Kind.ENTER, position.seq, position.step)
    for line in (verdict.ranks[0].line, verdict.ranks[6].line):
        assert line in " ".join(verdict.evidence)
    assert written(verdict)["ranks"][7]["sizes"] == list(SIZES)


def test_a_cycle_is_not_called_a_deadlock_before_the_quiet_window_is_over() -> None:
    verdict = look(metadata_rebuild(), after_s=0.4)
    assert verdict.verdict == "inconclusive"
    assert "the last event is 0.400 s old" in " ".join(verdict.evidence)
    assert verdict.cycle


def test_an_extra_collective_that_all_ranks_agree_on_is_clean() -> None:
    made = eight_ranks()
    whole_step(made, 1, extra=True)
    for recorder in made.recorders:
        recorder.done()
    assert look(made).verdict == "clean"
    assert look(made, wrong_numbers=["rank 3: token 7 is 5, not 6"]).verdict == "corrupt"


def test_a_straggler_is_slow_and_never_a_deadlock() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter(range(7), C1)
    verdict = look(made, after_s=600)
    assert (verdict.verdict, verdict.culprits) == ("slow", (7,))
    assert look(made, alive={7: True}).verdict == "slow"


def test_a_build_is_slow_and_says_when_its_heart_last_beat() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(range(1, 8), dispatch(0))
    made.recorders[0].local("build_begin", "gdn_sm90")
    made.recorders[0].local("heartbeat", "gdn_sm90")
    verdict = look(made, after_s=60)
    assert (verdict.verdict, verdict.culprits) == ("slow", (0,))
    assert "gdn_sm90" in " ".join(verdict.evidence)
    assert "heartbeat 60.0 s ago" in " ".join(verdict.evidence), verdict


def test_a_build_whose_rank_uses_no_processor_and_is_silent_is_only_likely_to_work() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(range(7), C1)
    verdict = look(made, cores={7: 0.0})
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("slow", (7,), "likely")
    assert "to see which" in " ".join(verdict.evidence)
    starved = look(made, cores={7: 0.0}, starved={7: 0.8})
    assert starved.confidence == "likely" and "rank 7 lacked a processor" in " ".join(starved.evidence)
    busy = look(made, cores={7: 0.97})
    assert (busy.verdict, busy.confidence) == ("slow", "certain")
    assert "keeps 0.97 processors busy" in " ".join(busy.evidence)
    made.recorders[7].local("heartbeat", "compile 3 of 64")
    beating = look(made, cores={7: 0.0})
    assert (beating.verdict, beating.confidence) == ("slow", "certain")
    assert "(compile 3 of 64)" in " ".join(beating.evidence)


def test_a_rank_that_has_not_started_is_slow() -> None:
    made = Scene(4, {"dp": range(4)})
    made.enter(range(3), C1)
    assert (look(made).verdict, look(made).culprits) == ("slow", (3,))


def test_a_vote_of_a_later_phase_is_no_part_of_the_step_before() -> None:
    """Who leaves it out and begins to serve is odd; those who vote have kept their word."""
    made = eight_ranks()
    whole_step(made, 0)
    made.phase("compile")
    made.enter(range(7), Collective("dp", "all_reduce", "compile.vote", (1,), "int32", "min"))
    made.recorders[7].phase("serve")
    made.recorders[7].begin_step(1, PLAN, 1)
    made.enter([7], C1)
    verdict = look(made)
    assert not set(verdict.culprits) & set(range(7)), verdict
    assert verdict.confidence != "certain" or verdict.culprits == (7,), verdict


@pytest.mark.parametrize("went_on", ["phase", "enter", "done"])
def test_who_went_on_from_a_collective_that_did_not_end_is_not_in_it(went_on: str) -> None:
    """As after an exception that was caught; a stall would be of those who are all there."""
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(EVERYONE, C1)
    match went_on:
        case "phase":
            made.recorders[0].phase("fallback")
        case "enter":
            made.enter([0], dispatch(0))
        case "done":
            made.recorders[0].done()
    verdict = look(made)
    assert verdict.verdict == {"phase": "slow", "enter": "deadlock", "done": "deadlock"}[went_on], verdict
    assert set(verdict.culprits) <= {0} and "nobody is absent" not in " ".join(verdict.evidence), verdict


def test_everybody_in_one_collective_is_a_stall() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(EVERYONE, dispatch(0))
    assert look(made).verdict == "stall"
    assert look(made, after_s=0.5).verdict == "inconclusive"
    assert look(made, excused={3: "stopped by a signal"}).verdict == "slow"
    busy = look(made, starved={3: 0.4})
    assert busy.verdict == "inconclusive" and "lacked a processor for 40%" in " ".join(busy.evidence)
    assert look(made, starved={3: 0.4}, after_s=11).verdict == "stall"


def test_the_rank_that_passed_over_a_collective_is_the_culprit() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter([r for r in EVERYONE if r != 5], dispatch(0))
    made.begin_step(3, PLAN, ranks=[5])
    made.enter([5], C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (5,))


def test_a_rank_that_enters_the_next_group_too_early_inverts_the_order() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter([r for r in EVERYONE if r != 5], C1)
    made.enter([5], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "order", (5,))
    assert "before dp all_reduce, which was due first" in " ".join(verdict.evidence)


def test_swapped_schedules_are_an_order_fault_and_who_changed_is_only_suspect() -> None:
    made = eight_ranks()
    for step in (1, 2):
        whole_step(made, step)
    made.begin_step(3, PLAN, ranks=[r for r in EVERYONE if r != 2])
    made.begin_step(3, (PLAN[1], PLAN[0], *PLAN[2:]), ranks=[2])
    made.enter([r for r in EVERYONE if r != 2], C1)
    made.enter([2], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "order", ())
    assert (verdict.suspects, verdict.confidence) == ((2,), "undecided")


def test_without_a_schedule_who_leaves_the_habit_of_earlier_steps_is_only_suspect() -> None:
    made = eight_ranks()
    for step in (1, 2, 3):
        whole_step(made, step, plan=())
    made.begin_step(4, ())
    made.all_of(EVERYONE, C1)
    made.enter([1], EXTRA)
    made.enter([r for r in EVERYONE if r != 1], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", ())
    assert (verdict.suspects, verdict.confidence) == ((1,), "undecided")


def test_without_a_schedule_or_a_habit_there_is_no_culprit() -> None:
    made = eight_ranks()
    made.enter([1], C1)
    made.enter([r for r in EVERYONE if r != 1], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (), "undecided")


def test_a_rank_that_waits_for_one_that_is_done_will_wait_for_ever() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.recorders[7].done()
    made.begin_step(2, PLAN, ranks=range(7))
    made.enter(range(7), C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", ())
    assert verdict.confidence == "undecided"


def test_a_rank_that_is_done_while_others_serve_left_too_early() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.recorders[7].done()
    made.begin_step(2, PLAN, live=[3], ranks=range(7))
    made.enter(range(7), C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (7,))
    assert "rank 3 had live requests" in " ".join(verdict.evidence)
    assert "not enough evidence" not in " ".join(verdict.evidence)


def test_where_collectives_are_only_queued_neither_their_end_nor_work_is_taken_for_granted() -> None:
    """As on NCCL: a mismatch is queued on both sides, and a rank that waits for its device looks idle."""
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.all_of(EVERYONE, dispatch(0))
    made.enter(range(7), C1)
    assert (look(made).verdict, look(made).culprits) == ("slow", (7,))
    queued = look(made, queued=("ep",))
    assert (queued.verdict, queued.culprits, queued.suspects) == ("inconclusive", (), (7,))
    assert "waiting for work queued on the device" in " ".join(queued.evidence)
    made.recorders[7].local("heartbeat", "builds")
    assert look(made, queued=("ep",)).verdict == "slow", "it gives a sign of work"
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.all_of(range(7), dispatch(0))
    made.all_of([7], Collective("ep", "broadcast", "layers.0.mlp", (4,), "float32", root=0))
    assert (look(made).verdict, look(made).culprits) == ("corrupt", (7,))
    queued = look(made, queued=("ep",))
    assert (queued.verdict, queued.culprits, queued.suspects) == ("inconclusive", (), (7,))
    assert "ep #1 is queued with different arguments" in " ".join(queued.evidence)
