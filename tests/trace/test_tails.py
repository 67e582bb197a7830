"""The witnesses of a live run as a watcher follows them: which are open, what their ranks did last, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scene import make_recorder

from hybrid_moe_ref.parallel.observer import Collective
from repro.store.run_dir import RunDir
from repro.trace.recording.recorder import Recorder
from repro.trace.start_ticks import read_start_ticks
from repro.trace.witness.format import Geometry, Identity
from repro.trace.witness.tails import Tails

TINY = Geometry(ring_records=32, vector_words=64, string_bytes=512, group_slots=4)
REDUCE = Collective("dp", "all_reduce", "", (32,), "int32", "sum")
HERE = Identity(0, 1, hostname="host0", boot_id="boot0", wall_offset_ns=10**18)
AHEAD_NS = 3_000  # of the clock of host1


class Run:
    """Ranks that record at times that a test sets. Rank 2 is on a host whose clock is ahead by AHEAD_NS."""

    def __init__(self, root: Path) -> None:
        self.dir, self.now_ns = RunDir(root), 0
        self.dir.witness(0).parent.mkdir(parents=True)

    def recorder(self, rank: int) -> Recorder:
        ahead_ns = AHEAD_NS if rank == 2 else 0
        path = self.dir.witness(rank)
        host = int(rank == 2)
        return make_recorder(rank, 3, lambda: self.now_ns + ahead_ns, TINY, "run", host, ahead_ns, path)[1]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_watcher_opens_each_witness_as_soon_as_it_is_there(run: Run) -> None:
    tails = Tails(run.dir, 3, HERE)
    tails.open()
    assert not tails.opened() and (tails.last_event_ns(), tails.heartbeat_ns(), tails.waiting_since_ns()) == (0, 0, 0)
    run.recorder(2), run.recorder(0)
    tails.open()
    first = tails.opened()
    assert [tail.writer().rank for tail in first] == [0, 2]
    assert {rank: writer.pid for rank, writer in tails.writers().items()} == {0: 100, 2: 102}
    run.dir.witness(1).write_bytes(b"no witness")
    tails.open()
    assert [*map(id, tails.opened())] == [*map(id, first)]  # they stay open, and the other is refused below


def test_all_witnesses_are_read_or_those_asked_for_and_the_others_are_named(run: Run) -> None:
    run.recorder(0), run.recorder(2)
    run.dir.witness(1).write_bytes(b"no witness")
    tails = Tails(run.dir, 3, HERE)
    witnesses, refused = tails.read()
    assert sorted(witnesses) == [0, 2] and len(refused) == 1
    assert refused[0].startswith("events/rank001.wit:10: ")
    witnesses, refused = tails.read([2])
    assert [*witnesses] == [2] and not refused
    assert tails.read([]) == ({}, [])


def test_times_of_a_rank_on_another_host_are_those_of_the_watchers_clock(run: Run) -> None:
    zero, two = run.recorder(0), run.recorder(2)
    tails = Tails(run.dir, 3, HERE)
    tails.open()
    run.now_ns = 50_000
    zero.enter(REDUCE)
    run.now_ns = 60_000
    two.enter(REDUCE)
    zero.local("heartbeat", "build")
    assert (tails.last_event_ns(), tails.heartbeat_ns(), tails.waiting_since_ns()) == (60_000, 60_000, 50_000)
    run.now_ns = 70_000
    two.local("heartbeat", "build")
    zero.leave(REDUCE)
    assert (tails.last_event_ns(), tails.heartbeat_ns(), tails.waiting_since_ns()) == (70_000, 70_000, 60_000)
    for event, waits in (("lock_wait", True), ("lock_held", False)):
        run.now_ns += 1_000
        zero.local(event, "cache")
        two.leave(REDUCE)
        assert tails.waiting_since_ns() == (run.now_ns if waits else 0), event


def test_who_is_done_and_whether_anyone_failed_is_seen_in_the_last_events(run: Run) -> None:
    recorders = [run.recorder(rank) for rank in range(3)]
    tails = Tails(run.dir, 3, HERE)
    tails.open()
    for rank, recorder in enumerate(recorders):
        assert not tails.all_done() and tails.done() == set(range(rank))
        recorder.phase("serve")
        recorder.done()
    assert tails.all_done() and tails.done() == {0, 1, 2} and not tails.any_failed()
    recorders[1].failed("no room")
    assert tails.any_failed() and not tails.all_done() and tails.done() == {0, 2}
    more = Tails(run.dir, 4, HERE)
    more.open()
    assert not more.all_done()


def test_two_clocks_are_compared_by_their_wall_clocks_and_one_is_not(run: Run) -> None:
    there = Identity(0, 1, hostname="host1", boot_id="boot1", wall_offset_ns=10**18 - AHEAD_NS)
    assert (HERE.clock_ahead_ns(there), there.clock_ahead_ns(HERE)) == (-AHEAD_NS, AHEAD_NS)
    for same in (
        Identity(1, 1, boot_id="boot0", wall_offset_ns=5),  # its wall clock was set since
        Identity(1, 1, wall_offset_ns=5),  # of an unknown host
    ):
        assert HERE.clock_ahead_ns(same) == same.clock_ahead_ns(HERE) == 0


def test_two_writers_share_processes_on_one_host_in_one_namespace_or_where_it_is_unknown() -> None:
    def writer(namespace: int, host: str = "host0", boot: str = "boot0") -> Identity:
        return Identity(0, 1, hostname=host, boot_id=boot, pid_namespace=namespace)

    assert writer(7).shares_processes(writer(7)) and writer(7).shares_processes(writer(0))
    assert writer(0).shares_processes(writer(0)) and not writer(7).shares_processes(writer(8))
    assert not writer(7).shares_processes(writer(7, host="host1"))
    assert not writer(7).shares_processes(writer(7, boot="boot1"))


def test_the_start_of_a_process_is_the_22nd_field_whatever_its_name_is() -> None:
    """proc(5) counts the pid as field 1 and the name in brackets as field 2."""
    plain = Path("/proc/self/stat").read_text()
    assert read_start_ticks(os.getpid()) == int(plain[plain.rindex(")") + 2 :].split()[22 - 3])
