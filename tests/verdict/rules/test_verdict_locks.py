"""The verdict on ranks that wait for locks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scene import MS, Scene
from serving import C1, EVERYONE, PLAN, eight_ranks, held, look

from hybrid_moe_ref.parallel.observer import Collective
from repro.hosts.agent import AgentStatus, RemoteHosts
from repro.hosts.host import Host
from repro.store.run_dir import RunDir, write_json
from repro.store.schema import to_json
from repro.verdict import Facts, Verdict, judge


def cold_build() -> Scene:
    """Rank 2 builds under a lock that the others wait for, before the first collective."""
    made = eight_ranks()
    made.recorders[2].local("lock_held", "/cache/gdn.lock", holder=102)
    made.recorders[2].local("build_begin", "gdn_sm90")
    for rank in (0, 1, 3, 4, 5, 6, 7):
        made.recorders[rank].local("lock_wait", "/cache/gdn.lock", holder=102)
    made.recorders[2].local("heartbeat", "builds gdn_sm90")
    for rank in (0, 1, 3, 4, 5, 6, 7):
        made.recorders[rank].local("heartbeat", "waits for gdn.lock of rank 2")
    return made


@pytest.mark.parametrize("after_s", [1, 1.5, 10, 600])
@pytest.mark.parametrize("holders", [{}, held("/cache/gdn.lock", 102)])
def test_a_cold_build_behind_a_lock_is_slow_and_says_who_builds_what_and_who_waits(
    after_s: float, holders: dict[int, tuple[str, int]]
) -> None:
    verdict = look(cold_build(), after_s=after_s, lock_holders=holders)
    assert (verdict.verdict, verdict.culprits) == ("slow", (2,))
    evidence = " ".join(verdict.evidence)
    assert "rank 2 building for" in evidence and "gdn_sm90, heartbeat" in evidence
    assert "rank 2 holds lock /cache/gdn.lock, for which ranks 0,1,3-7 wait" in evidence
    assert "rank 2 builds gdn_sm90 (serve)" in verdict.sentences()


def test_a_lock_whose_holder_changes_is_waited_for_since_the_first_word() -> None:
    made = eight_ranks()
    made.recorders[1].local("lock_wait", "/l", holder=100)
    made.now_ns += 5_000 * MS
    made.recorders[1].local("lock_wait", "/l", holder=102)
    made.recorders[2].local("lock_held", "/l")
    assert look(made, after_s=0).ranks[1].since_s > 5
    assert look(made).ranks[2].detail == "holds lock /l"


def test_a_baton_that_outlived_its_holder_is_a_deadlock_without_a_culprit_among_the_ranks() -> None:
    made = eight_ranks()
    for recorder in made.recorders:
        recorder.local("lock_wait", "/cache/gdn/lock", holder=4711)
    verdict = look(made, lock_holders=held("/cache/gdn/lock", 0))
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", ())
    assert "when they began to wait, process 4711 held it" in " ".join(verdict.evidence)
    assert look(made, lock_holders=held("/cache/gdn/lock", 0), after_s=0.5).verdict == "inconclusive"
    assert look(made).verdict == "slow", "the waiters name a holder, and nobody says that it is gone"


def test_a_baton_whose_holder_was_a_rank_that_died_is_its_crash() -> None:
    made = eight_ranks()
    made.recorders[4].local("lock_held", "/cache/gdn/lock")
    for rank in (0, 1, 2, 3, 5, 6, 7):
        made.recorders[rank].local("lock_wait", "/cache/gdn/lock", holder=104)
    for holders in ({}, held("/cache/gdn/lock", 0)):
        verdict = look(made, alive={4: False}, lock_holders=holders)
        assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (4,))


def test_a_rank_that_is_done_and_still_holds_a_lock_is_the_culprit() -> None:
    made = eight_ranks()
    made.recorders[1].local("lock_held", "/cache/lock")
    made.recorders[1].done()
    made.recorders[0].local("lock_wait", "/cache/lock")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", (1,))


def test_a_lock_that_is_with_a_rank_which_still_waits_for_it_is_named() -> None:
    """The kernel has given it, and the rank has not come to say so."""
    made = Scene(2, {"dp": range(2)})
    for rank in range(2):
        made.recorders[rank].local("lock_wait", "/cache/lock")
    verdict = look(made, lock_holders=held("/cache/lock", 101))
    assert verdict.verdict == "inconclusive", verdict
    assert "rank 1 holds lock /cache/lock, but did not record that it acquired the lock" in verdict.evidence, verdict


def test_a_lock_held_across_a_collective_is_a_deadlock_of_its_holder() -> None:
    made = eight_ranks()
    made.begin_step(1, PLAN)
    made.recorders[3].local("lock_held", "build.lock")
    made.enter([3], C1)
    made.enter([0, 1, 2, 4, 5, 6], C1)
    made.recorders[7].local("lock_wait", "build.lock", holder=103)
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", (3,))


def test_two_locks_taken_in_two_orders_are_a_deadlock_of_both_holders() -> None:
    made = eight_ranks()
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


def test_a_rank_that_dies_between_taking_a_lock_and_saying_so_is_a_crash() -> None:
    made = eight_ranks()
    made.recorders[0].local("lock_wait", "build.lock")
    made.recorders[7].local("lock_wait", "build.lock", holder=100)
    made.enter(range(1, 7), C1)
    verdict = look(made, alive={0: False})
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("crash", "dead_rank", (0,))


@pytest.mark.parametrize(
    ("holders", "expected"),
    [({}, "inconclusive"), (held("build.lock", 0), "deadlock"), (held("build.lock", 9), "slow")],
)
def test_a_lock_that_no_rank_holds_needs_what_the_system_says(
    holders: dict[int, tuple[str, int]], expected: str
) -> None:
    made = eight_ranks()
    for recorder in made.recorders:
        recorder.local("lock_wait", "build.lock")
    assert look(made, lock_holders=holders).verdict == expected


def test_containers_of_one_host_do_not_share_their_locks_and_pids() -> None:
    def judged(container: str) -> Verdict:
        made = eight_ranks()
        made.begin_step(1, PLAN)
        made.recorders[3].local("lock_held", "/cache/lock")
        made.enter([r for r in EVERYONE if r != 7], C1)
        made.recorders[7].local("lock_wait", "/cache/lock", holder=103)
        witnesses = made.witnesses()
        witnesses[7] = replace(witnesses[7], writer=replace(witnesses[7].writer, hostname=container))
        return judge(witnesses, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1)

    assert (judged("host0").verdict, judged("host0").culprits) == ("deadlock", (3,))
    assert (judged("pod-7").verdict, judged("pod-7").culprits) == ("slow", ())


def test_what_the_system_says_of_a_lock_holds_on_its_own_host_alone() -> None:
    made = eight_ranks()
    made.enter(range(4), C1)
    for recorder in made.recorders[4:]:
        recorder.local("lock_wait", "/cache/lock")
    witnesses = made.witnesses()
    for rank in range(4, 8):
        witnesses[rank] = replace(witnesses[rank], writer=replace(witnesses[rank].writer, hostname="elsewhere"))

    def judged(here: range) -> str:
        facts = Facts(alive=dict.fromkeys(here, True), lock_holders=held("/cache/lock", 0, here))
        return judge(witnesses, facts, num_ranks=8, now_ns=made.now_ns + 2000 * MS, quiet_window_s=1).verdict

    assert (judged(range(4, 8)), judged(range(4))) == ("deadlock", "inconclusive")


def test_each_host_has_a_lock_file_of_its_own_and_a_holder_on_one_host_is_nobody_on_another(tmp_path: Path) -> None:
    """Three hosts whose containers have the same small pids, each with a lock of the same path on a local disk."""
    lock = "/cache/experts.lock"
    made = Scene(6, {"dp": range(6)})
    made.recorders[0].local("lock_wait", lock)
    made.enter(range(1, 6), Collective("dp", "all_reduce", "step", (1,), "int32", "sum"))
    witnesses = made.witnesses()
    for rank, witness in witnesses.items():
        boot, pid = "ABC"[rank // 2], 11 + rank % 2
        writer = replace(witness.writer, boot_id=boot, hostname=f"host{boot}", pid=pid)
        witnesses[rank] = replace(witness, writer=writer)
    run_dir = RunDir.create(tmp_path, "metadata_rebuild", "fault", 0)
    run_dir.agents.mkdir()
    for first, boot, pid in ((2, "B", 22), (4, "C", 12)):
        facts = Facts(alive={first: True, first + 1: True}, lock_holders={first: (lock, pid)})
        report = AgentStatus(1, boot, 0, (first, first + 1), facts)
        write_json(run_dir.agent(first), to_json(report))
    mine = Facts(alive={0: True, 1: True}, lock_holders={0: (lock, 11)})
    facts = RemoteHosts(run_dir, Host()).merged(mine)
    assert facts.lock_holders == {0: (lock, 11), 2: (lock, 22), 4: (lock, 12)}
    for holders in (facts.lock_holders, {rank: facts.lock_holders[rank] for rank in (2, 4)}):
        verdict = judge(
            witnesses, replace(facts, lock_holders=holders), num_ranks=6, now_ns=made.now_ns + 3_000 * MS,
            quiet_window_s=1.0,
        )  # fmt: skip
        assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict


def test_a_lock_that_two_ranks_record_as_theirs_names_neither() -> None:
    made = eight_ranks()
    for rank in (2, 3):
        made.recorders[rank].local("lock_held", "build.lock")
    made.enter(range(7), C1)
    made.recorders[7].local("lock_wait", "build.lock")
    verdict = look(made)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", ()), verdict
    assert (verdict.suspects, verdict.confidence) == ((2, 3), "undecided"), verdict


def test_a_lock_that_the_system_sees_with_another_rank_than_the_witnesses_names_neither() -> None:
    made = eight_ranks()
    made.recorders[3].local("lock_held", "build.lock")
    made.enter(range(7), C1)
    made.recorders[7].local("lock_wait", "build.lock", holder=103)
    verdict = look(made, lock_holders=held("build.lock", 105, [7]))
    assert (verdict.verdict, verdict.culprits) == ("inconclusive", ()), verdict


def test_waiters_that_name_different_holders_of_a_lock_name_none() -> None:
    """The holder changed while they came."""
    made = eight_ranks()
    for rank in range(8):
        made.recorders[rank].local("lock_wait", "build.lock", holder=4711 + rank % 2)
    assert look(made).verdict == "inconclusive", look(made)
    made = eight_ranks()
    for rank in range(8):
        made.recorders[rank].local("lock_wait", "build.lock", holder=4711)
    assert (look(made).verdict, look(made).confidence) == ("slow", "likely"), look(made)
    assert look(made, lock_holders=held("build.lock", 4712)).confidence == "certain"
