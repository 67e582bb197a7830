"""The verdict on scenes small enough to be read: one test per class and cause."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from scene import MS, SMALL, Scene

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.layout import RECORD, Event, Geometry, Identity, Kind, pack_header
from repro.verdict import Verdict, judge

EVERYONE = range(8)
C1 = Collective("dp", "all_reduce", "", (32,), "int32", "sum")
EXTRA = Collective("dp", "all_reduce", "layers.0.linear_attn", (32,), "int32", "sum")
SIZES = (4, 4, 4, 4, 4, 4, 1, 1)


def dispatch(layer: int) -> Collective:
    return Collective("ep", "all_gather_v", f"layers.{layer}.mlp", SIZES, "float32")


def combine(layer: int) -> Collective:
    return Collective("ep", "reduce_scatter_v", f"layers.{layer}.mlp", SIZES, "float32", "sum")


STEP = [C1, dispatch(0), combine(0), dispatch(1), combine(1)]
PLAN = tuple(ScheduleEntry(call.group, call.op, call.layer) for call in STEP)


def scene(**more: Any) -> Scene:
    made = Scene(8, {"dp": EVERYONE, "ep": EVERYONE}, **more)
    made.phase("serve")
    return made


def whole_step(made: Scene, step: int, *, plan: tuple[ScheduleEntry, ...] = PLAN, extra: bool = False) -> None:
    made.begin_step(step, plan, live=EVERYONE)
    for call in STEP:
        if extra and call == dispatch(0):
            made.all_of(EVERYONE, EXTRA)
        made.all_of(EVERYONE, call)


def look(made: Scene, *, after_s: float = 2.0, **more: Any) -> Verdict:
    now_ns = made.now_ns + int(after_s * 1e9)
    return judge(made.witnesses(), num_ranks=made.num_ranks, now_ns=now_ns, quiet_window_s=1.0, **more)


def metadata_rebuild(**more: Any) -> Scene:
    """Ranks with live requests issue one dp all_reduce more inside layer 0; before step 12 all ranks did."""
    made = scene(**more)
    for step in range(10, 12):
        whole_step(made, step, extra=True)
    made.begin_step(12, PLAN, live=range(6))
    made.all_of(EVERYONE, C1)
    made.enter(range(6), EXTRA)
    made.enter((6, 7), dispatch(0))
    return made


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
    assert json.loads(json.dumps(verdict.to_json()))["ranks"][7]["sizes"] == list(SIZES)


@pytest.mark.parametrize(("ring_records", "culprits"), [(40, tuple(range(6))), (4, ())])
def test_a_schedule_in_two_parts_is_one_and_who_declared_only_the_first_does_not_differ(
    ring_records: int, culprits: tuple[int, ...]
) -> None:
    """As a step that may be split declares it: what comes after its agreement depends on that. A ring that has lost
    the first part has lost the beginning of the step."""
    made = scene(shape=Geometry(ring_records=ring_records))
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


def test_a_cycle_is_not_called_a_deadlock_before_the_quiet_window_is_over() -> None:
    verdict = look(metadata_rebuild(), after_s=0.4)
    assert verdict.verdict == "inconclusive"
    assert "quiet for 0.400 s only" in " ".join(verdict.evidence)
    assert verdict.cycle


def test_an_extra_collective_that_all_ranks_agree_on_is_clean() -> None:
    made = scene()
    whole_step(made, 1, extra=True)
    for recorder in made.recorders:
        recorder.done()
    assert look(made).verdict == "clean"
    assert look(made, wrong_numbers=["rank 3: token 7 is 5, not 6"]).verdict == "corrupt"


def test_a_straggler_is_slow_and_never_a_deadlock() -> None:
    made = scene()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter(range(7), C1)
    verdict = look(made, after_s=600)
    assert (verdict.verdict, verdict.culprits) == ("slow", (7,))
    assert look(made, alive={7: True}).verdict == "slow"


def test_a_build_is_slow_and_says_when_its_heart_last_beat() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(range(1, 8), dispatch(0))
    made.recorders[0].local("build_begin", "gdn_sm90")
    made.recorders[0].local("heartbeat", "gdn_sm90")
    verdict = look(made, after_s=60)
    assert (verdict.verdict, verdict.culprits) == ("slow", (0,))
    assert "gdn_sm90" in " ".join(verdict.evidence)


def cold_build() -> Scene:
    """Rank 2 builds under a lock that the others wait for, before the first collective."""
    made = scene()
    made.recorders[2].local("lock_held", "/cache/gdn.lock", holder=102)
    made.recorders[2].local("build_begin", "gdn_sm90")
    for rank in (0, 1, 3, 4, 5, 6, 7):
        made.recorders[rank].local("lock_wait", "/cache/gdn.lock", holder=102)
    made.recorders[2].local("heartbeat", "builds gdn_sm90")
    for rank in (0, 1, 3, 4, 5, 6, 7):
        made.recorders[rank].local("heartbeat", "waits for gdn.lock of rank 2")
    return made


@pytest.mark.parametrize("after_s", [1, 1.5, 10, 600])
@pytest.mark.parametrize("holders", [{}, {"/cache/gdn.lock": 102}])
def test_a_cold_build_behind_a_lock_is_slow_and_says_who_builds_what_and_who_waits(
    after_s: float, holders: dict[str, int]
) -> None:
    verdict = look(cold_build(), after_s=after_s, lock_holders=holders)
    assert (verdict.verdict, verdict.culprits) == ("slow", (2,))
    told = " ".join(verdict.evidence)
    assert "rank 2 building for" in told and "gdn_sm90, heartbeat" in told
    assert "lock /cache/gdn.lock, for which ranks 0,1,3-7 wait, is with rank 2" in told
    assert "rank 2 builds gdn_sm90 (serve)" in verdict.sentences()


def test_a_build_whose_rank_uses_no_processor_and_is_silent_is_only_likely_to_work() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.enter(range(7), C1)
    verdict = look(made, cores={7: 0.0})
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("slow", (7,), "likely")
    assert "the stack tells" in " ".join(verdict.evidence)
    starved = look(made, cores={7: 0.0}, starved={7: 0.8})
    assert starved.confidence == "likely" and "rank 7 lacked a processor" in " ".join(starved.evidence)
    busy = look(made, cores={7: 0.97})
    assert (busy.verdict, busy.confidence) == ("slow", "certain")
    assert "keeps 0.97 processors busy" in " ".join(busy.evidence)
    made.recorders[7].local("heartbeat", "compile 3 of 64")
    beating = look(made, cores={7: 0.0})
    assert (beating.verdict, beating.confidence) == ("slow", "certain")
    assert "(compile 3 of 64)" in " ".join(beating.evidence)


def test_a_lock_whose_holder_changes_is_waited_for_since_the_first_word() -> None:
    made = scene()
    made.recorders[1].local("lock_wait", "/l", holder=100)
    made.now_ns += 5_000 * MS
    made.recorders[1].local("lock_wait", "/l", holder=102)
    made.recorders[2].local("lock_held", "/l")
    assert look(made, after_s=0).ranks[1].since_s > 5
    assert look(made).ranks[2].detail == "holds lock /l"


def test_a_baton_that_outlived_its_holder_is_a_deadlock_without_a_culprit_among_the_ranks() -> None:
    made = scene()
    for recorder in made.recorders:
        recorder.local("lock_wait", "/cache/gdn/lock", holder=4711)
    verdict = look(made, lock_holders={"/cache/gdn/lock": 0})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", ())
    assert "when they began to wait it was with process 4711" in " ".join(verdict.evidence)
    assert look(made, lock_holders={"/cache/gdn/lock": 0}, after_s=0.5).verdict == "inconclusive"
    assert look(made).verdict == "slow", "the waiters name a holder, and nobody says that it is gone"


def test_a_baton_whose_holder_was_a_rank_that_died_is_its_crash() -> None:
    made = scene()
    made.recorders[4].local("lock_held", "/cache/gdn/lock")
    for rank in (0, 1, 2, 3, 5, 6, 7):
        made.recorders[rank].local("lock_wait", "/cache/gdn/lock", holder=104)
    for holders in ({}, {"/cache/gdn/lock": 0}):
        verdict = look(made, alive={4: False}, lock_holders=holders)
        assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (4,))


def test_a_rank_that_has_not_started_is_slow() -> None:
    made = Scene(4, {"dp": range(4)})
    made.enter(range(3), C1)
    assert (look(made).verdict, look(made).culprits) == ("slow", (3,))


def test_a_dead_rank_is_a_crash_and_the_waits_are_its_consequence() -> None:
    made = scene()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter(range(7), C1)
    verdict = look(made, alive={7: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (7,))
    made.enter([7], C1)
    verdict = look(made, alive={7: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (7,))


def test_of_several_dead_ranks_the_first_is_to_blame_and_without_an_order_none() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.enter(EVERYONE, C1)
    alive = dict.fromkeys((2, 5, 6), False)
    first = look(made, alive=alive, died={5: 10.0, 2: 10.1, 6: 10.1})
    assert (first.verdict, first.cause, first.culprits) == ("crash", "dead_rank", (5,))
    assert "rank 5 was gone first, ranks 2,6 later" in first.evidence
    for died in ({}, {5: 10.0, 2: 10.0, 6: 10.1}, {5: 10.0}):
        unordered = look(made, alive=alive, died=died)
        assert (unordered.verdict, unordered.cause, unordered.culprits) == ("crash", "dead_rank", ())
        assert (unordered.suspects, unordered.confidence) == ((2, 5, 6), "undecided")


def test_an_error_is_a_crash_that_quotes_it() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.recorders[2].failed("ScheduleMismatch: entry 4")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", (2,))
    assert "ScheduleMismatch: entry 4" in " ".join(verdict.evidence)


def test_an_error_in_a_wait_for_others_is_not_the_fault_of_who_waited() -> None:
    """As when a backend's timeout ends it."""
    made = scene()
    made.begin_step(1, PLAN)
    made.enter(range(1, 8), C1)
    made.recorders[5].failed("RuntimeError: timed out waiting")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", ())
    assert (verdict.suspects, verdict.confidence) == ((0,), "undecided")
    assert "rank 5 gave up in dp all_reduce #1, waiting for 0" in verdict.evidence
    made.recorders[0].failed("MemoryError: the cause")
    assert (look(made).culprits, look(made).confidence) == ((0,), "certain")


def test_an_error_that_all_were_told_is_the_fault_of_whom_it_names_and_not_of_who_said_it_first() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    for rank in (0, 4, 1):
        made.recorders[rank].failed("ScheduleMismatch: rank 1 would issue another")
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("crash", (), "undecided")
    made.recorders[7].failed("ValueError: of its own")
    assert (look(made).culprits, look(made).confidence) == ((0,), "likely")


@pytest.mark.parametrize(
    ("missed_s", "cause", "culprits", "confidence"),
    [(60.0, "error", (0,), "likely"), (0.1, "dead_rank", (3,), "likely"), (None, "dead_rank", (3,), "likely")],
)
def test_who_gave_up_clearly_before_another_died_is_not_its_victim(
    missed_s: float | None, cause: str, culprits: tuple[int, ...], confidence: str
) -> None:
    """As when a backend aborts the others long after the one that they wait for has failed."""
    made = scene()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.recorders[0].failed("ValueError: of its own")
    made.enter(range(1, 8), dispatch(0))
    died = {} if missed_s is None else {3: made.now_ns / 1e9 + missed_s}
    verdict = look(made, after_s=70.0, alive={3: False}, died=died)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", cause, culprits), verdict
    assert verdict.confidence == confidence and (culprits == (0,) or verdict.suspects == (0,)), verdict


def test_deaths_on_two_hosts_are_in_no_order_unless_far_apart() -> None:
    made = Scene(4, {"dp": range(4)})
    for rank in (2, 3):
        elsewhere = Identity(rank, 4, "test", "host1", "boot1", pid=100 + rank, wall_offset_ns=10**18)
        header = pack_header(elsewhere, SMALL)
        made.files[rank][: len(header)] = header
    made.phase("serve")
    alive = {0: False, 3: False}
    near = look(made, alive=alive, died={0: 10.25, 3: 10.5})
    assert (near.culprits, near.suspects, near.confidence) == ((), (0, 3), "undecided")
    assert look(made, alive=alive, died={0: 10.0, 3: 12.0}).culprits == (0,)


def test_a_lock_that_was_waited_for_to_the_limit_is_told_as_a_lock() -> None:
    made = Scene(2, {"dp": range(2)})
    made.recorders[1].local("lock_held", "/cache/lock")
    made.recorders[1].local("build_begin", "gdn")
    made.recorders[0].local("lock_wait", "/cache/lock")
    made.recorders[0].failed("LockTimeout: not let go")
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.suspects) == ("crash", (), (1,))
    assert "rank 0 gave up in lock /cache/lock, waiting for 1" in verdict.evidence


@pytest.mark.parametrize(("dead", "culprits"), [([0, 2, 3], ()), ([2], (2,))])
def test_where_a_rank_never_began_who_died_may_have_been_ended_for_it(dead: list[int], culprits: tuple[int]) -> None:
    """A rank that cannot even import what it needs leaves no word, and the launcher ends all others. One that died
    while others live was not ended."""
    made = Scene(4, {"dp": range(4)})
    made.phase("connect")
    header = pack_header(Identity(1, 4, "test"), SMALL)
    made.files[1][:] = header + bytes(SMALL.file_bytes - len(header))
    verdict = look(made, alive=dict.fromkeys(dead, False), died={rank: 10.0 + rank for rank in dead})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", culprits)
    if not culprits:
        assert (verdict.suspects, verdict.confidence) == ((0, 1, 2, 3), "undecided")
        assert any(line.startswith("rank 1 never began") for line in verdict.evidence), verdict


def test_a_vote_of_a_later_phase_is_no_part_of_the_step_before() -> None:
    """Who leaves it out and begins to serve is odd; those who vote have kept their word."""
    made = scene()
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
    made = scene()
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


def test_a_rank_that_is_done_with_a_lock_in_its_hand_is_to_blame_for_it() -> None:
    made = scene()
    made.recorders[1].local("lock_held", "/cache/lock")
    made.recorders[1].done()
    made.recorders[0].local("lock_wait", "/cache/lock")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", (1,))


def test_a_group_of_other_ranks_hides_who_waits_in_it() -> None:
    """A witness may say anything."""
    made = scene()
    made.recorders[0].groups({"odd": (70, 80)})
    made.enter([0], Collective("odd", "all_reduce", "", (4,), "float32", "sum"))
    verdict = look(made)
    assert verdict.ranks[0].state == "hidden" and verdict.verdict != "deadlock", verdict


def test_ranks_that_failed_are_no_more_left_at_work_than_those_that_died() -> None:
    """One never began; two lost their connection, and the launcher ended the last."""
    made = Scene(4, {"dp": range(4)})
    made.phase("connect")
    header = pack_header(Identity(1, 4, "test"), SMALL)
    made.files[1][:] = header + bytes(SMALL.file_bytes - len(header))
    for rank in (0, 3):
        made.recorders[rank].failed("ConnectionError: closed by peer")
    verdict = look(made, alive={2: False}, died={2: 10.0})
    assert (verdict.verdict, verdict.culprits, verdict.suspects) == ("crash", (), (0, 1, 2, 3))


def test_a_done_rank_whose_ring_lost_the_step_is_not_said_to_have_never_begun_it() -> None:
    made = scene(shape=Geometry(ring_records=16))
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


def test_a_lock_that_is_with_a_rank_which_still_waits_for_it_is_told() -> None:
    """The kernel has given it, and the rank has not come to say so."""
    made = Scene(2, {"dp": range(2)})
    for rank in range(2):
        made.recorders[rank].local("lock_wait", "/cache/lock")
    verdict = look(made, lock_holders={"/cache/lock": 101})
    assert verdict.verdict == "inconclusive", verdict
    assert "lock /cache/lock is with rank 1, which has not said that it got it" in verdict.evidence, verdict


def test_everybody_in_one_collective_is_a_stall() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(EVERYONE, dispatch(0))
    assert look(made).verdict == "stall"
    assert look(made, after_s=0.5).verdict == "inconclusive"
    assert look(made, excused={3: "stopped by a signal"}).verdict == "slow"
    busy = look(made, starved={3: 0.4})
    assert busy.verdict == "inconclusive" and "lacked a processor for 40%" in " ".join(busy.evidence)
    assert look(made, starved={3: 0.4}, after_s=11).verdict == "stall"


def test_a_skipped_collective_blames_the_rank_that_passed_it_over() -> None:
    made = scene()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter([r for r in EVERYONE if r != 5], dispatch(0))
    made.begin_step(3, PLAN, ranks=[5])
    made.enter([5], C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (5,))


def test_a_rank_that_enters_the_next_group_too_early_inverts_the_order() -> None:
    made = scene()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter([r for r in EVERYONE if r != 5], C1)
    made.enter([5], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "order", (5,))
    assert "before dp all_reduce, which was due first" in " ".join(verdict.evidence)


def test_swapped_schedules_are_an_order_fault_and_who_changed_is_only_suspect() -> None:
    made = scene()
    for step in (1, 2):
        whole_step(made, step)
    made.begin_step(3, PLAN, ranks=[r for r in EVERYONE if r != 2])
    made.begin_step(3, (PLAN[1], PLAN[0], *PLAN[2:]), ranks=[2])
    made.enter([r for r in EVERYONE if r != 2], C1)
    made.enter([2], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "order", ())
    assert (verdict.suspects, verdict.confidence) == ((2,), "undecided")


def test_different_operations_under_one_number_are_a_mismatch() -> None:
    made = scene()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(range(7), dispatch(0))
    made.enter([7], Collective("ep", "broadcast", "layers.0.mlp", (4,), "float32", root=0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "mismatch", (7,))


def test_a_stale_size_vector_is_found_by_what_the_others_say_of_themselves() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.enter(range(1, 8), dispatch(0))
    made.enter([0], Collective("ep", "all_gather_v", "layers.0.mlp", (4, 4, 9, 4, 4, 4, 1, 1), "float32"))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "sizes", (0,))
    verdict = look(made, alive={3: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "sizes", (0,))


def test_an_extra_collective_that_pairs_silently_is_corrupt() -> None:
    made = scene()
    whole_step(made, 1)
    made.begin_step(2, PLAN, live=[0])
    made.all_of(EVERYONE, C1)
    made.enter([0], EXTRA)
    for call in STEP[1:]:
        made.all_of(range(1, 8), call)
    made.begin_step(3, PLAN, ranks=range(1, 8))
    made.all_of(range(1, 8), C1)
    made.leave([0], EXTRA)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("corrupt", "extra", (0,))


def test_a_lock_held_across_a_collective_is_a_deadlock_of_its_holder() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.recorders[3].local("lock_held", "build.lock")
    made.enter([3], C1)
    made.enter([0, 1, 2, 4, 5, 6], C1)
    made.recorders[7].local("lock_wait", "build.lock", holder=103)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", (3,))


def test_two_locks_taken_in_two_orders_are_a_deadlock_of_both_holders() -> None:
    made = scene()
    for rank, first, second in ((2, "a.lock", "b.lock"), (5, "b.lock", "a.lock")):
        made.recorders[rank].local("lock_held", first)
        made.recorders[rank].local("lock_wait", second, holder=107 - rank)
    made.enter([r for r in EVERYONE if r not in (2, 5)], C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", (2, 5))
    assert {link["waits_in"] for link in verdict.cycle} == {"lock a.lock", "lock b.lock"}
    assert verdict.evidence[-2:] == tuple(
        f"rank {rank} holds lock {held} and waits for lock {wanted} (serve)"
        for rank, held, wanted in ((2, "a.lock", "b.lock"), (5, "b.lock", "a.lock"))
    ), verdict.evidence


def transfer(op: str, peer: int, **more: Any) -> Collective:
    return Collective("pp", op, "layers.0.mlp", (8,), "float32", "", peer)._replace(**more)


def pipeline() -> Scene:
    made = Scene(4, {"pp": range(4)})
    for rank in range(4):
        first, second = ("send", "recv") if rank % 2 == 0 else ("recv", "send")
        plan = tuple(ScheduleEntry("pp", op, "layers.0.mlp") for op in (first, second))
        made.begin_step(1, plan, ranks=[rank])
    return made


def test_two_ranks_that_both_send_first_are_a_deadlock_of_who_left_its_schedule() -> None:
    made = pipeline()
    made.enter([0], transfer("send", 1))
    made.enter([1], transfer("send", 0))
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("deadlock", (1,)), verdict
    assert {link["waits_in"] for link in verdict.cycle} == {"pp:0>1 send #1", "pp:1>0 send #1"}
    made = pipeline()
    made.enter([0], transfer("send", 1))
    made.enter([1], transfer("recv", 0))
    assert look(made).verdict == "stall"
    made.leave([0], transfer("send", 1))
    made.leave([1], transfer("recv", 0))
    made.enter([0], transfer("recv", 1))
    assert (look(made).verdict, look(made).culprits) == ("slow", (1,))


def test_a_transfer_whose_ends_differ_is_a_mismatch() -> None:
    made = pipeline()
    made.enter([0], transfer("send", 1))
    made.enter([1], transfer("recv", 0, dtype="int32"))
    assert (look(made).verdict, look(made).cause, look(made).culprits) == ("deadlock", "mismatch", ())
    made.leave([0], transfer("send", 1))
    made.leave([1], transfer("recv", 0, dtype="int32"))
    assert look(made).verdict == "corrupt"


def test_a_rank_that_dies_between_taking_a_lock_and_saying_so_is_a_crash() -> None:
    made = scene()
    made.recorders[0].local("lock_wait", "build.lock")
    made.recorders[7].local("lock_wait", "build.lock", holder=100)
    made.enter(range(1, 7), C1)
    verdict = look(made, alive={0: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (0,))


@pytest.mark.parametrize(
    ("holders", "expected"), [({}, "inconclusive"), ({"build.lock": 0}, "deadlock"), ({"build.lock": 9}, "slow")]
)
def test_a_lock_that_no_rank_holds_needs_the_word_of_the_system(holders: dict[str, int], expected: str) -> None:
    made = scene()
    for recorder in made.recorders:
        recorder.local("lock_wait", "build.lock")
    assert look(made, lock_holders=holders).verdict == expected


def test_a_missing_witness_that_waits_end_in_is_inconclusive() -> None:
    made = scene()
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


def test_without_a_schedule_who_leaves_the_habit_of_earlier_steps_is_only_suspect() -> None:
    made = scene()
    for step in (1, 2, 3):
        whole_step(made, step, plan=())
    made.begin_step(4, ())
    made.all_of(EVERYONE, C1)
    made.enter([1], EXTRA)
    made.enter([r for r in EVERYONE if r != 1], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", ())
    assert (verdict.suspects, verdict.confidence) == ((1,), "undecided")


def test_without_a_schedule_or_a_habit_guilt_is_undecided() -> None:
    made = scene()
    made.enter([1], C1)
    made.enter([r for r in EVERYONE if r != 1], dispatch(0))
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("deadlock", (), "undecided")


def test_a_rank_that_waits_for_one_that_is_done_will_wait_for_ever() -> None:
    made = scene()
    whole_step(made, 1)
    made.recorders[7].done()
    made.begin_step(2, PLAN, ranks=range(7))
    made.enter(range(7), C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", ())
    assert verdict.confidence == "undecided"


def test_a_rank_that_is_done_while_others_serve_left_too_early() -> None:
    made = scene()
    whole_step(made, 1)
    made.recorders[7].done()
    made.begin_step(2, PLAN, live=[3], ranks=range(7))
    made.enter(range(7), C1)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "skipped", (7,))
    assert "rank 3 had requests" in " ".join(verdict.evidence)


def test_a_group_beyond_the_slots_hides_who_waits_in_it_and_makes_no_deadlock() -> None:
    made = Scene(4, {"a": range(4), "b": range(4), "c": range(4)}, shape=Geometry(512, 512, 16_384, 2))
    calls = [Collective(name, "all_reduce", "", (4,), "int32", "sum") for name in "abc"]
    for call in calls:
        made.all_of(range(4), call)
    made.enter(range(3), calls[2])
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("slow", (3,)), verdict.evidence
    assert "ranks 0-2 wait in c all_reduce #2, a group that the witness could not follow" in verdict.sentences()
    made.enter([3], calls[0])  # and who waits for these waits for ranks that are hidden
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict.evidence


def test_containers_of_one_host_do_not_share_their_locks_and_pids() -> None:
    def judged(container: str) -> Verdict:
        made = scene()
        made.begin_step(1, PLAN)
        made.recorders[3].local("lock_held", "/cache/lock")
        made.enter([r for r in EVERYONE if r != 7], C1)
        made.recorders[7].local("lock_wait", "/cache/lock", holder=103)
        witnesses = made.witnesses()
        witnesses[7] = replace(witnesses[7], who=replace(witnesses[7].who, hostname=container))
        return judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1)

    assert (judged("host0").verdict, judged("host0").culprits) == ("deadlock", (3,))
    assert (judged("pod-7").verdict, judged("pod-7").culprits) == ("slow", ())


def test_what_the_system_says_of_a_lock_holds_on_its_own_host_alone() -> None:
    made = scene()
    made.enter(range(4), C1)
    for recorder in made.recorders[4:]:
        recorder.local("lock_wait", "/cache/lock")
    witnesses = made.witnesses()
    for rank in range(4, 8):
        witnesses[rank] = replace(witnesses[rank], who=replace(witnesses[rank].who, hostname="elsewhere"))

    def judged(here: range) -> str:
        told: dict[str, Any] = {"alive": dict.fromkeys(here, True), "lock_holders": {"/cache/lock": 0}}
        return judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1, **told).verdict

    assert (judged(range(4, 8)), judged(range(4))) == ("deadlock", "inconclusive")


def test_where_collectives_are_only_queued_neither_their_end_nor_work_is_taken_for_granted() -> None:
    """As on NCCL: a mismatch is queued on both sides, and a rank that waits for its device looks idle."""
    made = scene()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.all_of(EVERYONE, dispatch(0))
    made.enter(range(7), C1)
    assert (look(made).verdict, look(made).culprits) == ("slow", (7,))
    queued = look(made, queued=("ep",))
    assert (queued.verdict, queued.culprits, queued.suspects) == ("inconclusive", (), (7,))
    assert "wait on their devices" in " ".join(queued.evidence)
    made.recorders[7].local("heartbeat", "builds")
    assert look(made, queued=("ep",)).verdict == "slow", "it gives a sign of work"
    made = scene()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.all_of(range(7), dispatch(0))
    made.all_of([7], Collective("ep", "broadcast", "layers.0.mlp", (4,), "float32", root=0))
    assert (look(made).verdict, look(made).culprits) == ("corrupt", (7,))
    queued = look(made, queued=("ep",))
    assert (queued.verdict, queued.culprits, queued.suspects) == ("inconclusive", (), (7,))
    assert "ep #1 is queued on both sides" in " ".join(queued.evidence)


def test_a_failed_rank_whose_groups_lost_their_members_is_still_a_crash() -> None:
    made = scene()
    made.begin_step(1, PLAN)
    made.enter(EVERYONE, C1)
    made.recorders[2].failed("out of memory")
    at = made.files[2].index(b"0,1,2,3,4,5,6,7")
    made.files[2][at] = ord("x")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", (2,))
    assert look(made, alive={2: False}).verdict == "crash"


def test_witnesses_of_another_run_are_named_and_left_out() -> None:
    made = metadata_rebuild()
    witnesses = made.witnesses()
    witnesses[7] = scene(run_id="another").witnesses()[7]
    verdict = judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1)
    assert "another" in " ".join(verdict.evidence)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "extra", tuple(range(6)))
    assert verdict.confidence == "likely"


def test_eight_ranks_are_judged_in_milliseconds() -> None:
    made = metadata_rebuild()
    witnesses = made.witnesses()
    start = time.perf_counter()
    judge(witnesses, num_ranks=8, now_ns=made.now_ns, quiet_window_s=1.0)
    assert time.perf_counter() - start < 0.5
