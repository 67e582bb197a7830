"""The verdict on ranks that died or failed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scene import MS, SMALL, Scene
from serving import C1, EVERYONE, PLAN, dispatch, eight_ranks, look, whole_step

from repro.trace.witness.format import Identity, pack_header
from repro.verdict import Facts, judge


def test_a_dead_rank_is_a_crash_and_the_waits_are_its_consequence() -> None:
    made = eight_ranks()
    whole_step(made, 1)
    made.begin_step(2, PLAN)
    made.enter(range(7), C1)
    verdict = look(made, alive={7: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (7,))
    made.enter([7], C1)
    verdict = look(made, alive={7: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (7,))


def test_of_several_dead_ranks_the_first_is_the_culprit_and_without_an_order_none() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(EVERYONE, C1)
    alive = dict.fromkeys((2, 5, 6), False)
    first = look(made, alive=alive, died={5: 10.0, 2: 10.1, 6: 10.1})
    assert (first.verdict, first.cause, first.culprits) == ("crash", "dead_rank", (5,))
    assert "the death of rank 5 was noticed first, that of ranks 2,6 later" in first.evidence
    for died in ({}, {5: 10.0, 2: 10.0, 6: 10.1}, {5: 10.0}):
        unordered = look(made, alive=alive, died=died)
        assert (unordered.verdict, unordered.cause, unordered.culprits) == ("crash", "dead_rank", ())
        assert (unordered.suspects, unordered.confidence) == ((2, 5, 6), "undecided")


def test_an_error_is_a_crash_that_quotes_it() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.recorders[2].failed("ScheduleMismatch: entry 4")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", (2,))
    assert "ScheduleMismatch: entry 4" in " ".join(verdict.evidence)


def test_an_error_in_a_wait_for_others_is_not_the_fault_of_who_waited() -> None:
    """As when a backend's timeout ends it."""
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(range(1, 8), C1)
    made.recorders[5].failed("RuntimeError: timed out waiting")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", ())
    assert (verdict.suspects, verdict.confidence) == ((0,), "undecided")
    assert "rank 5 gave up in dp all_reduce #1, waiting for 0" in verdict.evidence
    made.recorders[0].failed("MemoryError: the cause")
    assert (look(made).culprits, look(made).confidence) == ((0,), "certain")


def test_an_error_that_several_ranks_report_in_the_same_words_names_nobody_by_who_reported_it_first() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    for rank in (0, 4, 1):
        made.recorders[rank].failed("ScheduleMismatch: rank 1 would issue another")
    verdict = look(made)
    assert (verdict.verdict, verdict.culprits, verdict.confidence) == ("crash", (), "undecided")
    made.recorders[7].failed("ValueError: of its own")
    later = look(made)
    assert (later.culprits, later.suspects, later.confidence) == ((), (7,), "undecided"), later
    made = eight_ranks()
    for rank, words in (
        (7, "ValueError: of its own"),
        (0, "ScheduleMismatch: rank 7"),
        (1, "ScheduleMismatch: rank 7"),
    ):
        made.recorders[rank].failed(words)
    assert (look(made).culprits, look(made).confidence) == ((7,), "likely"), look(made)


def test_ranks_that_the_user_interrupts_have_not_crashed() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(range(1, 8), C1)
    for rank in (0, 5):
        made.recorders[rank].failed("KeyboardInterrupt: ")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits, verdict.suspects) == ("inconclusive", "", (), ())
    assert (
        "ranks 0,5 were interrupted (KeyboardInterrupt: Ctrl-C or SIGINT): not a fault of the job" in verdict.evidence
    )
    assert "rank 5 waited in dp all_reduce #1 for 0 at the interrupt" in verdict.evidence
    made.recorders[6].failed("RuntimeError: Connection closed by peer")
    assert look(made).verdict == "inconclusive", "rank 6 failed because rank 0 had left"
    died = {7: made.now_ns / 1e9 + 2.5}
    assert look(made, after_s=3.0, alive={7: False}, died=died).verdict == "inconclusive", "torchrun killed rank 7"
    assert look(made, after_s=3.0, alive={7: False}).verdict == "crash", "rank 7 may have died before"


def test_an_error_or_a_death_that_the_user_interrupts_later_is_a_crash() -> None:
    made = eight_ranks()
    made.recorders[3].failed("ValueError: of its own")
    first_s = made.now_ns / 1e9
    made.now_ns += 10_000 * MS
    made.recorders[0].failed("KeyboardInterrupt: ")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", (3,))
    made = eight_ranks()
    made.now_ns += 10_000 * MS
    made.recorders[0].failed("KeyboardInterrupt: ")
    verdict = look(made, alive={3: False}, died={3: first_s})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (3,))


def test_a_rank_that_fails_between_two_deaths_follows_the_first() -> None:
    """Rank 0 dies, rank 1 misses it two seconds later, and the launcher kills rank 2 for that."""
    made = eight_ranks()
    made.all_of(EVERYONE, C1)
    first_s = made.now_ns / 1e9
    made.now_ns += 2_000 * MS
    made.recorders[1].failed("RuntimeError: remote process exited")
    second_s = made.now_ns / 1e9 + 2.5
    for died in ({0: first_s}, {0: first_s, 2: second_s}):
        verdict = look(made, after_s=3.0, alive=dict.fromkeys(died, False), died=died)
        assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (0,)), verdict
    undated = look(made, after_s=3.0, alive={0: False, 2: False}, died={2: second_s})
    assert (undated.culprits, undated.suspects, undated.confidence) == ((), (0, 1, 2), "undecided"), undated


def test_a_rank_that_failed_long_before_a_death_is_the_culprit_although_another_failed_after_it() -> None:
    made = eight_ranks()
    made.recorders[0].failed("ValueError: of its own")
    made.now_ns += 60_000 * MS
    died = {3: made.now_ns / 1e9}
    made.recorders[5].failed("RuntimeError: remote process exited")
    verdict = look(made, alive={3: False}, died=died)
    assert (verdict.cause, verdict.culprits, verdict.confidence) == ("error", (0,), "likely"), verdict


def test_a_rank_that_died_after_a_long_wait_may_have_been_ended_by_a_timeout_of_its_backend() -> None:
    """As NCCL's watchdog ends a rank whose collective does not complete, because of a rank that never comes or of the
    network."""
    for absent in ((6, 7), ()):
        made = eight_ranks()
        made.enter([rank for rank in EVERYONE if rank not in absent], C1)
        made.now_ns += 600_000 * MS
        verdict = look(made, alive={3: False}, died={3: made.now_ns / 1e9})
        assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", ()), verdict
        assert (verdict.suspects, verdict.confidence) == ((3, *absent), "undecided"), verdict
        assert any("rank 3 had waited in dp all_reduce #1 for 600 s" in line for line in verdict.evidence), verdict


@pytest.mark.parametrize(
    ("missed_s", "cause", "culprits", "suspects", "confidence"),
    [
        (60.0, "error", (0,), (), "likely"),
        (0.1, "dead_rank", (3,), (0,), "likely"),
        (None, "dead_rank", (), (0, 3), "undecided"),
    ],
)
def test_a_rank_that_failed_clearly_before_another_died_is_not_its_victim(
    missed_s: float | None, cause: str, culprits: tuple[int, ...], suspects: tuple[int, ...], confidence: str
) -> None:
    """As when a backend aborts the others long after the one that they wait for has failed. Where nothing says when
    the other died, it may have waited for long before."""
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.all_of(EVERYONE, C1)
    made.recorders[0].failed("ValueError: of its own")
    made.enter(range(1, 8), dispatch(0))
    died = {} if missed_s is None else {3: made.now_ns / 1e9 + missed_s}
    verdict = look(made, after_s=70.0, alive={3: False}, died=died)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", cause, culprits), verdict
    assert (verdict.suspects, verdict.confidence) == (suspects, confidence), verdict


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


def test_a_failed_wait_for_a_lock_names_the_lock_and_its_holder() -> None:
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


def test_a_failed_rank_whose_groups_lost_their_members_is_still_a_crash() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.enter(EVERYONE, C1)
    made.recorders[2].failed("out of memory")
    witnesses = made.witnesses()
    groups = tuple(replace(group, members=()) for group in witnesses[2].groups)
    witnesses[2] = replace(witnesses[2], groups=groups, complete=False)
    for alive in (True, False):
        verdict = judge(witnesses, Facts({2: alive}), num_ranks=8, now_ns=made.now_ns + 2_000 * MS, quiet_window_s=1.0)
        assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "error", (2,)), verdict
