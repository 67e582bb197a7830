"""A collective that is not the schedule's next entry is refused before it is issued, and all ranks stop."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from hybrid_moe_ref.config import PROTOCOLS, EngineConfig, ParallelConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.step.plan import StepPlan
from hybrid_moe_ref.engine.step.protocol import protocol_of
from hybrid_moe_ref.parallel.checks import strict as strict_check
from hybrid_moe_ref.parallel.checks.guard import ScheduleGuard
from hybrid_moe_ref.parallel.checks.schedule import first_difference, schedule_hash
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import (
    CollectiveStalled,
    Halt,
    PeerLost,
    RollCall,
    ScheduleMismatch,
    Watchdog,
    wait_or_halt,
)
from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.lab.settings import RunSettings

AGREE = ScheduleEntry("dp", "all_reduce", "step")
DISPATCH = ScheduleEntry("ep", "all_gather_v", "layers.0.moe")
COMBINE = ScheduleEntry("ep", "reduce_scatter_v", "layers.0.moe")


def issue(guard, entry, sizes=()):
    guard.admit(Collective(entry.group, entry.op, entry.layer, sizes))


@pytest.fixture
def guard():
    guard = ScheduleGuard(3, Halt(None))
    guard.begin(7, (AGREE, DISPATCH, COMBINE))
    return guard


def test_the_schedule_in_order_is_admitted(guard):
    for entry in (AGREE, DISPATCH, COMBINE):
        issue(guard, entry)
    guard.begin(8, (AGREE,))


def test_an_extra_collective_is_refused_with_both_sides(guard):
    issue(guard, AGREE)
    with pytest.raises(ScheduleMismatch, match=r"^rank 3 would issue dp all_reduce of step in step 7, but"):
        issue(guard, AGREE)


def test_a_skipped_collective_is_refused_at_the_one_after_it(guard):
    issue(guard, AGREE)
    with pytest.raises(ScheduleMismatch, match=r"ep reduce_scatter_v.*the schedule has ep all_gather_v"):
        issue(guard, COMBINE)


def test_a_schedule_that_was_not_used_up_is_refused_at_the_next_step(guard):
    issue(guard, AGREE)
    with pytest.raises(ScheduleMismatch, match=r"began step 8, but had not issued ep all_gather_v of layers.0.moe"):
        guard.begin(8, (AGREE,))


def test_sizes_other_than_the_agreed_are_refused(guard):
    issue(guard, AGREE)
    guard.agree("ep", (1, 2, 3))
    with pytest.raises(ScheduleMismatch, match=r"with sizes \[1, 2, 2\], but the agreed sizes are \[1, 2, 3\]"):
        issue(guard, DISPATCH, (1, 2, 2))


def test_without_a_schedule_everything_is_admitted():
    issue(ScheduleGuard(0, Halt(None)), COMBINE)


def test_a_refused_replay_is_published_only_while_the_guard_is_active():
    halt = Halt(dist.HashStore())
    guard = ScheduleGuard(2, halt)
    with pytest.raises(ScheduleMismatch, match=r"^rank 2 would replay something else$"):
        guard.refuse("would replay something else")
    assert halt.published() is None
    guard.begin(7, (AGREE,))
    with pytest.raises(ScheduleMismatch):
        guard.refuse("would replay something else")
    assert str(halt.published()) == "rank 2 would replay something else"


def test_schedules_are_compared_by_hash_and_the_first_difference_is_found():
    assert schedule_hash((AGREE, DISPATCH)) != schedule_hash((DISPATCH, AGREE)) != schedule_hash((DISPATCH,))
    assert first_difference([["a", "b"], ["a", "c"], ["a"]]) == (1, {"b": [0], "c": [1], "nothing": [2]})


@pytest.mark.parametrize("version", PROTOCOLS)
def test_the_step_agreement_compares_schedules_of_all_ranks_and_tokens_of_tp_groups(version):
    protocol = protocol_of(EngineConfig(protocol=version))

    def agreed(tp_size=1, **hashes):
        ((name, values),) = hashes.items()
        plans = [StepPlan(1, 1, 1, query_lengths=(1,), **{name: value}) for value in values]
        return protocol.resolve(list(zip(*map(protocol.column, plans), strict=True)), tp_size)

    assert not agreed(schedule_hash=(5, 5, 6)).same_schedule
    assert agreed(schedule_hash=(5, 5)).same_schedule
    assert agreed(feed_hash=(5, 5, 6, 6), tp_size=2).same_feed
    assert not agreed(feed_hash=(5, 5, 6, 6), tp_size=4).same_feed


def test_ranks_with_different_schedules_all_raise_with_the_first_entry_that_differs(tmp_path):
    def run(rank, store):
        server = RunSettings("metadata_rebuild", "control", num_ranks=2).server()
        comm = Communicator.connect(server.parallel, rank, store=store, timeout_s=30)
        engine = Engine(server, comm)
        if rank == 1:  # as a rank whose drafter does not run
            known = engine.runner.schedules
            engine.runner.schedules = dataclasses.replace(known, forward=known.forward[:-2])
        with pytest.raises(ScheduleMismatch) as caught:
            engine.serve([])
        return str(caught.value)

    messages = run_ranks(2, tmp_path, run)
    assert messages[0] == messages[1] == (
        "step 1: the schedules differ at entry 15: ep all_gather_v of layers.7.moe on ranks [0]; "
        "nothing on ranks [1]"
    )  # fmt: skip


def test_a_refusal_wakes_ranks_that_already_wait_in_a_collective(tmp_path):
    def run(rank, store):
        comm = Communicator.connect(ParallelConfig(dp_size=4), rank, store=store, timeout_s=30)
        comm.guard.begin(1, (AGREE, AGREE))
        comm.all_reduce("dp", torch.ones(1), layer="step")
        if rank == 2:
            time.sleep(0.3)
        with pytest.raises(ScheduleMismatch) as caught:
            comm.all_reduce("dp", torch.ones(1), layer="step" if rank != 2 else "elsewhere")
        return str(caught.value)

    messages = run_ranks(4, tmp_path, run)
    assert set(messages) == {
        "rank 2 would issue dp all_reduce of elsewhere in step 1, but the schedule has dp all_reduce of step"
    }


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"reduce_op": "max"}, "all_reduce of step float32 max sizes [4]"),
        ({"x": torch.ones(5)}, "all_reduce of step float32 sum sizes [5]"),
        ({"x": torch.ones(4, dtype=torch.int32)}, "all_reduce of step int32 sum sizes [4]"),
        ({"layer": "elsewhere"}, "all_reduce of elsewhere float32 sum sizes [4]"),
    ],
)
def test_strict_ranks_compare_before_anything_is_sent(tmp_path, odd, words):
    def run(rank, store):
        comm = Communicator.connect(ParallelConfig(dp_size=4), rank, store=store, timeout_s=30)
        comm.start_strict_comparison()
        usual = {"x": torch.ones(4), "reduce_op": "sum", "layer": "step"}
        comm.all_reduce("dp", **usual)
        with pytest.raises(ScheduleMismatch) as caught:
            comm.all_reduce("dp", **(usual | (odd if rank == 2 else {})))
        return str(caught.value)

    messages = run_ranks(4, tmp_path, run)
    assert len(set(messages)) == 1, messages
    assert messages[0].startswith("dp #2: ") and f"ranks [2] {words}" in messages[0], messages


def test_strict_ranks_name_who_does_not_come(tmp_path, monkeypatch):
    def run(rank, store):
        comm = Communicator.connect(ParallelConfig(dp_size=3), rank, store=store, timeout_s=30)
        comm.start_strict_comparison()
        comm._strict._patience_s = 0.5
        if rank == 1:
            store.wait(["named 0", "named 2"])
            return ""
        arrivals = [comm._strict._key("dp", 1, present) for present in (0, 2)]
        clock = SimpleNamespace(  # stands still until both are there: the patience is not for one that starts late
            monotonic=lambda: time.monotonic() if comm._strict._store.check(arrivals) else 0.0, sleep=time.sleep
        )
        monkeypatch.setattr(strict_check, "time", clock)
        with pytest.raises(ScheduleMismatch) as caught:
            comm.all_reduce("dp", torch.ones(2), layer="step")
        store.set(f"named {rank}", "")
        return str(caught.value)

    messages = run_ranks(3, tmp_path, run)
    assert messages[0] == messages[2] == "ranks [1] did not arrive at dp #1, all_reduce of step float32 sum sizes [2]"


@pytest.mark.full
def test_ranks_that_meet_in_the_store_wait_longer_than_a_collective_would(tmp_path):
    def run(rank, store):
        comm = Communicator.connect(ParallelConfig(dp_size=2), rank, store=store, timeout_s=5)
        if rank == 1:
            time.sleep(8)
        with comm.patiently(60):
            return comm.all_reduce("dp", torch.ones(1), layer="vote").item()

    assert run_ranks(2, tmp_path, run) == [2.0, 2.0]


class Work:
    """A collective that is still running at the first look, and has ended when asked whether it has."""

    def __init__(self, error):
        self.error, self.waits = error, 0

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)

    def is_completed(self):
        return True


def test_a_collective_that_ends_right_after_a_look_up_is_no_failure():
    wait_or_halt(Work(""), Halt(None))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        wait_or_halt(Work("Connection closed by peer"), Halt(None))


def test_a_peer_that_is_gone_after_the_collective_has_ended_is_not_missed():
    class Ends(Work):
        def is_completed(self):
            return self.waits > 1

    watchdog = Watchdog(0, Halt(None))
    watchdog.roll_call = SimpleNamespace(lost=lambda: [1], pid=lambda rank: 7)
    wait_or_halt(Ends(""), Halt(None), watchdog)
    with pytest.raises(PeerLost, match="rank 1 was lost: its process 7 has ended"):
        wait_or_halt(SimpleNamespace(wait=Work("not yet").wait, is_completed=lambda: False), Halt(None), watchdog)


def test_a_published_error_is_raised_rather_than_that_of_the_closed_connection():
    class Published(Halt):
        def published(self):
            return ScheduleMismatch("rank 2 would issue ...")

    with pytest.raises(ScheduleMismatch, match="rank 2 would issue"):
        wait_or_halt(Work("Connection closed by peer"), Published(None))


def test_a_process_that_is_gone_is_missed_and_one_that_is_stopped_is_not(tmp_path):
    def store():
        return dist.FileStore(str(tmp_path / "store"), 2)

    if (pid := os.fork()) == 0:
        RollCall(1, range(2), store())
        time.sleep(600)
        os._exit(0)
    try:
        mine = RollCall(0, range(2), store())
        store().wait(["roll_call/1"])
        assert mine.lost() == []
        os.kill(pid, signal.SIGSTOP)
        assert mine.lost() == [] and mine.pid(1) == pid
    finally:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not mine.lost() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mine.lost() == [1], "not reaped yet, it is gone all the same"
    os.waitpid(pid, 0)
    assert mine.lost() == [1]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.full)])
def test_with_a_limit_a_collective_that_does_not_end_stops_all_with_its_layer(tmp_path, strict):
    def run(rank, store):
        comm = Communicator.connect(ParallelConfig(dp_size=3), rank, store=store, timeout_s=30)
        comm.start_watchdog()
        comm.limit_waits(0.4)
        if strict:
            comm.start_strict_comparison()
        if rank == 2:
            store.wait(["stopped 0", "stopped 1"])
        with pytest.raises(CollectiveStalled) as caught:
            comm.all_reduce("dp", torch.ones(1), layer="layers.0.moe")
            comm.all_reduce("dp", torch.ones(1), layer="layers.0.moe")
        store.set(f"stopped {rank}", "")
        return str(caught.value)

    messages = run_ranks(3, tmp_path, run)
    assert len(set(messages)) == 1 and "in dp all_reduce of layers.0.moe; the limit is 0.4 s" in messages[0], messages
