"""The verdict where witnesses are missing, torn, wrapped, or of another run."""

from __future__ import annotations

import pytest
from scene import MS, Scene
from serving import C1, EVERYONE, EXTRA, PLAN, STEP, dispatch, eight_ranks, look, metadata_rebuild, whole_step

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.witness.format import GUARD, LIVE_AT, RECORD, WORD, Geometry
from repro.verdict import judge


@pytest.mark.parametrize(("ring_records", "culprits"), [(40, tuple(range(6))), (4, ())])
def test_a_schedule_in_two_parts_is_one_and_who_declared_only_the_first_does_not_differ(
    ring_records: int, culprits: tuple[int, ...]
) -> None:
    """As a step that may be split declares it: what comes after its agreement depends on that. A ring that has lost
    the first part has lost the beginning of the step."""
    made = eight_ranks(shape=Geometry(ring_records=ring_records))
    for step in range(8, 12):
        made.begin_step(step, PLAN[:1], live=EVERYONE)
        made.all_of(EVERYONE, C1)
        made.begin_step(step, PLAN[1:], live=EVERYONE)
        for call in STEP[1:]:
            made.all_of(EVERYONE, call)
    made.begin_step(12, PLAN[:1], live=EVERYONE)
    made.all_of(EVERYONE, C1)
    for rank in range(7):
        made.recorders[rank].begin_step(12, PLAN[1:], 1)
    made.enter(range(6), EXTRA)
    made.enter((6,), dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("deadlock", culprits), verdict
    assert not any("schedules" in line for line in verdict.evidence), verdict


def test_a_group_of_other_ranks_hides_who_waits_in_it() -> None:
    """A witness may say anything."""
    made = eight_ranks()
    made.recorders[0].groups({"odd": (70, 80)})
    made.enter([0], Collective("odd", "all_reduce", "", (4,), "float32", "sum"))
    verdict = look(made)
    assert verdict.ranks[0].state == "hidden" and verdict.verdict != "deadlock", verdict


def test_a_done_rank_whose_ring_lost_the_step_is_not_said_to_have_never_begun_it() -> None:
    made = eight_ranks(shape=Geometry(ring_records=16))
    whole_step(made, 6)
    made.begin_step(7, PLAN[:1], ranks=[7])
    made.recorders[7].enter(C1)
    made.begin_step(7, PLAN, live=range(7), ranks=range(7))
    made.enter(range(7), C1)
    made.leave(EVERYONE, C1)
    for _ in range(20):
        made.recorders[7].local("lock_held", "a")
        made.recorders[7].local("lock_freed", "a")
    made.recorders[7].done()
    made.enter(range(7), dispatch(0))
    verdict = look(made)
    assert verdict.verdict == "deadlock" and not any("never began" in line for line in verdict.evidence), verdict
    assert verdict.culprits == (), verdict


def test_a_missing_witness_that_waits_end_in_is_inconclusive() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter(range(7), C1)
    witnesses = made.witnesses()
    del witnesses[7]
    verdict = judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1)
    assert verdict.verdict == "inconclusive"
    assert "rank 7" in " ".join(verdict.evidence)


def test_a_missing_witness_does_not_hide_a_cycle_among_the_others() -> None:
    made = metadata_rebuild()
    witnesses = made.witnesses()
    del witnesses[3]
    verdict = judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (0, 1, 2, 4, 5), "likely")


def test_a_group_beyond_the_slots_hides_who_waits_in_it_and_makes_no_deadlock() -> None:
    made = Scene(4, {"a": range(4), "b": range(4), "c": range(4)}, shape=Geometry(512, 512, 16_384, 2))
    calls = [Collective(name, "all_reduce", "", (4,), "int32", "sum") for name in "abc"]
    for call in calls:
        made.all_of(range(4), call)
    made.enter(range(3), calls[2])
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("slow", (3,)), verdict.evidence
    assert "ranks 0-2 wait in c all_reduce #2, a group that the witness does not track" in verdict.sentences()
    made.enter([3], calls[0])  # and who waits for these waits for ranks that are hidden
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict.evidence


def test_witnesses_of_another_run_are_named_and_left_out() -> None:
    made = metadata_rebuild()
    witnesses = made.witnesses()
    witnesses[7] = eight_ranks(run_id="another").witnesses()[7]
    verdict = judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1)
    assert "another" in " ".join(verdict.evidence)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", tuple(range(6)))
    assert verdict.confidence == "likely"


def test_a_record_that_is_torn_in_the_last_slot_of_a_ring_hides_its_rank() -> None:
    """The event before it filled the last slot but one."""
    made = Scene(2, {"dp": range(2)}, shape=Geometry(ring_records=8))
    made.phase("serve")
    for _ in range(3):
        made.all_of(range(2), C1)
    made.enter(range(2), C1)
    shape = Geometry(ring_records=8)
    at = shape.ring_at + 7 * RECORD.size
    made.files[1][at + 40 : at + RECORD.size] = bytes(RECORD.size - 40)
    WORD.pack_into(made.files[1], LIVE_AT, 7 * GUARD)
    witness = made.witnesses()[1]
    assert (witness.num_events, witness.complete) == (7, False), witness.problems
    assert look(made).verdict == "inconclusive"
