"""The verdict on which ranks are in a collective, have left it, or never came: an absence must be seen to convict."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scene import MS, Scene
from serving import C1, EVERYONE, PLAN, dispatch, eight_ranks, look, whole_step

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.witness.format import Geometry
from repro.verdict import Facts, judge

GRADS = Collective("dp", "all_reduce", "grads", (4,), "float32", "sum")


def test_ranks_that_are_in_a_collective_that_others_have_left_are_no_stall() -> None:
    """As where the witnesses of one host are a look older than those of another, or ranks have not yet returned."""
    made = Scene(4, {"ep": range(4)})
    call = Collective("ep", "all_reduce", "layers.0.moe", (8,), "float32", "sum")
    made.all_of(range(4), call)
    made.enter(range(4), call)
    stale = made.witnesses()
    made.leave(range(4), call)
    made.all_of(range(4), call)
    made.enter([0, 1], call)
    fresh = made.witnesses()
    witnesses = {0: fresh[0], 1: fresh[1], 2: stale[2], 3: stale[3]}

    def judged(**facts: dict[int, float]) -> tuple[str, tuple[int, ...], tuple[int, ...], str]:
        now_ns = made.now_ns + 1_200 * MS
        verdict = judge(witnesses, Facts(**facts), num_ranks=4, now_ns=now_ns, quiet_window_s=1.0)
        assert "nobody is absent" not in " ".join(verdict.evidence), verdict
        assert any("ranks 2,3 are in ep all_reduce #2, which ranks 0,1 have left" in line for line in verdict.evidence)
        return verdict.verdict, verdict.culprits, verdict.suspects, verdict.confidence

    assert judged() == ("inconclusive", (), (2, 3), "undecided")
    assert judged(cores={2: 0.0, 3: 0.0}) == ("inconclusive", (), (2, 3), "undecided")
    assert judged(cores={2: 0.5, 3: 0.5}) == ("slow", (2, 3), (), "likely")
    assert judged(starved={2: 0.9, 3: 0.2}) == ("slow", (2, 3), (), "likely")


def test_a_rank_that_issued_a_collective_without_waiting_for_it_takes_part_after_it_is_done() -> None:
    """Its process is parked, and the backend serves the collective."""
    made = Scene(3, {"dp": range(3)})
    made.phase("serve")
    made.recorders[0].issue(GRADS)
    made.recorders[0].done()
    made.enter([1], GRADS)
    made.recorders[2].local("build_begin", "gdn")
    made.recorders[2].local("heartbeat", "gdn")
    verdict = look(made, cores={2: 0.99})
    assert (verdict.verdict, verdict.culprits) == ("slow", (2,)), verdict
    made.recorders[2].local("build_end", "gdn")
    made.enter([2], GRADS)
    stall = look(made)
    assert (stall.verdict, stall.culprits, stall.confidence) == ("stall", (), "likely"), stall
    assert "rank 0 is done and never waited for dp all_reduce #1" in " ".join(stall.evidence), stall
    gone = look(made, alive={0: False})
    assert (gone.verdict, gone.culprits) == ("deadlock", ()), gone
    assert "rank 0 ended before dp all_reduce #1 completed" in " ".join(gone.evidence), gone


@pytest.mark.parametrize("kind", ["blocking", "waited"])
def test_a_rank_that_is_done_after_a_wait_that_did_not_end_does_not_take_part(kind: str) -> None:
    made = Scene(3, {"dp": range(3)})
    if kind == "blocking":
        made.enter([0], GRADS)
    else:
        made.recorders[0].wait(GRADS, made.recorders[0].issue(GRADS))
    made.recorders[0].done()
    made.enter([1, 2], GRADS)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", ()), verdict


def test_a_rank_without_a_free_slot_for_a_group_is_not_absent_from_it() -> None:
    """Rank 1 has used its last slot for another group: how often it issued in this one, its witness cannot say."""
    made = Scene(2, {}, shape=Geometry(512, 512, 16_384, 2))
    calls = {name: Collective(name, "all_reduce", "", (4,), "int32", "sum") for name in ("dp", "tp", "ep")}
    for rank, names in ((0, ("dp", "tp", "ep")), (1, ("dp", "ep", "tp"))):
        made.recorders[rank].groups(dict.fromkeys(names, (0, 1)))
    made.enter([0], calls["tp"])
    made.recorders[1].issue(calls["tp"])
    made.enter([1], calls["dp"])
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict


def test_a_done_rank_whose_witness_is_torn_is_not_known_to_be_absent() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN, live=[3])
    made.recorders[7].done()
    made.enter(range(7), C1)
    witnesses = made.witnesses()
    witnesses[7] = replace(witnesses[7], complete=False)
    verdict = judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2_000 * MS, quiet_window_s=1.0)
    assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict


def test_a_member_that_is_no_rank_of_the_run_leaves_open_whether_all_have_come() -> None:
    made = Scene(2, {"dp": range(3)})
    made.enter(range(2), Collective("dp", "all_reduce", "", (4,), "int32", "sum"))
    verdict = look(made)
    assert verdict.verdict == "inconclusive", verdict


def test_what_a_broadcast_completes_without_is_not_waited_for() -> None:
    """The root has sent it and left; a rank that has not come holds nobody up who only receives."""
    made = Scene(4, {"dp": range(4), "ep": range(4)})
    weights = Collective("dp", "broadcast", "weights", (8,), "float32", root=0)
    vote = Collective("ep", "all_reduce", "vote", (1,), "int32", "sum")
    made.all_of([0], weights)
    made.enter([1], weights)
    made.enter([0, 2, 3], vote)
    verdict = look(made)
    assert not verdict.cycle and verdict.culprits == () and verdict.verdict == "inconclusive", verdict


def test_two_processes_of_one_number_are_not_taken_for_each_other() -> None:
    """Containers that share the host's name: their process numbers say nothing about each other."""
    made = Scene(3, {"dp": range(3)})
    made.recorders[0].local("lock_wait", "/cache/lock", holder=101)
    made.enter([1, 2], GRADS)
    witnesses = made.witnesses()
    witnesses[2] = replace(witnesses[2], writer=replace(witnesses[2].writer, pid=101))
    holders = {0: ("/cache/lock", 101)}
    verdict = judge(
        witnesses, Facts(lock_holders=holders), num_ranks=3, now_ns=made.now_ns + 2_000 * MS, quiet_window_s=1.0
    )
    assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict


def test_a_stall_counts_a_member_that_computes_while_its_collective_is_pending() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.recorders[7].issue(dispatch(0))
    made.enter(range(7), dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.confidence) == ("stall", "likely"), verdict
    assert "rank 7 runs outside any collective with ep all_gather_v #1 pending" in " ".join(verdict.evidence), verdict
    assert look(made, queued=("ep",)).verdict == "inconclusive"
