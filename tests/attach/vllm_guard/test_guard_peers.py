"""Lost peers: who is gone is told exactly, by name, and an end as it should is no loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from repro.attach.vllm.guard.ending.guard_thread import PARENT_FIRST_S, GuardThread
from repro.attach.vllm.guard.ending.peers import SILENT_S, Peers, Process, gone, start_ticks
from repro.attach.vllm.guard.ending.stop import EXIT_CODE, GRACE_S, Stop
from repro.attach.vllm.guard.meeting.meeting import Meeting


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Server:
    """The guard thread of rank 0, and a store with what another process says."""

    def __init__(self, process: Process, mode: str = "agree", exit_code=lambda pid: None) -> None:
        self.clock, self.left, store = Clock(), [], dist.HashStore()
        self.meeting = Meeting(dist.PrefixStore("hmr_guard", store))
        self.meeting.prepare(range(2))
        self.meeting.set(f"process/{process.name}", process.text())
        self.stop = Stop("rank 0", mode == "agree", self.left.append, self.clock)
        mine = [Process.this("worker of rank 0", 0)]
        names = [mine[0].name, process.name]
        self.guard_thread = GuardThread(self.stop, lambda: self.meeting, mine, names, exit_code, self.clock)

    def look(self, after_s: float = 0.2) -> str:
        self.clock.now_s += after_s
        self.guard_thread.look()
        return self.stop.sentence


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and wait until it has ended; it is not reaped."""
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while start_ticks(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_killed_worker_is_named_with_its_process_by_ranks_that_cannot_know_the_signal(sleeper):
    server = Server(Process.of("worker of rank 1", 1, sleeper.pid))
    assert server.look() == ""
    end(sleeper)
    assert server.look() == "", "its parent knows the exit code, and speaks first"
    assert server.look(PARENT_FIRST_S + 0.1) == f"rank 1 is gone: its worker (pid {sleeper.pid}) has ended"
    assert not server.stop.due()
    server.clock.now_s += GRACE_S
    assert server.stop.due()


def test_its_engine_knows_the_signal_and_speaks_at_once(sleeper):
    server = Server(Process.of("worker of rank 1", 1, sleeper.pid), exit_code=lambda pid: -9)
    server.look()
    end(sleeper)
    assert server.look() == f"rank 1 is gone: its worker (pid {sleeper.pid}) was ended by SIGKILL"


def test_a_process_that_left_as_it_should_is_not_lost(sleeper):
    server = Server(Process.of("engine of rank 1", 1, sleeper.pid))
    server.look()
    server.meeting.set("left/engine of rank 1", "1")
    end(sleeper)
    assert server.look() == "" and server.look(10) == ""


def test_a_stopped_process_is_not_lost(sleeper):
    server = Server(Process.of("worker of rank 1", 1, sleeper.pid))
    sleeper.send_signal(signal.SIGSTOP)
    assert [server.look(10) for _ in range(3)] == ["", "", ""]
    sleeper.send_signal(signal.SIGCONT)


def test_observe_names_a_lost_peer_once_and_stops_nothing(sleeper, capfd):
    server = Server(Process.of("worker of rank 1", 1, sleeper.pid), mode="observe")
    server.look()
    end(sleeper)
    for _ in range(4):
        assert server.look(1) == ""
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"[rank 0] repro guard: would refuse: rank 1 is gone: its worker (pid {sleeper.pid}) has ended"]


def test_a_process_id_that_was_used_again_counts_as_ended():
    peers = Peers()
    peers.add(Process("worker of rank 1", 1, os.getpid(), start_ticks(os.getpid()) - 5, Process.this("x", 0).host))
    assert [process.rank for process in peers.ended()] == [1]


def test_without_pidfds_the_start_time_tells(sleeper, monkeypatch):
    def missing(pid):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    peers = Peers()
    peers.add(Process.of("worker of rank 1", 1, sleeper.pid))
    assert not peers.ended()
    end(sleeper)
    assert peers.ended()


def test_a_host_that_is_silent_is_named_and_one_process_that_beats_keeps_it_up():
    clock = Clock()
    peers = Peers(clock)
    for rank in (4, 5):
        peers.add(Process(f"worker of rank {rank}", rank, 10, 20, "another host"))
    clock.now_s += SILENT_S - 1
    peers.beat("worker of rank 5", "1")
    clock.now_s += 2
    assert peers.silent() is None
    clock.now_s += SILENT_S
    silent = peers.silent()
    assert silent is not None and silent[0].rank == 4


def test_sentences_about_the_end_of_a_process():
    process = Process("engine of rank 3", 3, 77, 1, "")
    assert gone(process) == "rank 3 is gone: its engine (pid 77) has ended"
    assert gone(process, 1) == "rank 3 is gone: its engine (pid 77) has ended with exit code 1"
    assert gone(process, EXIT_CODE).startswith("rank 3 is gone: its engine (pid 77) was ended by the guard, whose line")
    assert gone(process, -11) == "rank 3 is gone: its engine (pid 77) was ended by SIGSEGV"


def test_a_lost_store_means_that_rank_0_is_gone_and_a_shutdown_does_not(sleeper):
    server = Server(Process.of("worker of rank 0", 0, sleeper.pid))
    server.guard_thread._processes = [Process.this("worker of rank 1", 1)]
    server.guard_thread._clock = time.monotonic
    server.look()
    server.guard_thread._unknown = {"worker of rank 0"}
    server.guard_thread._search(server.meeting)
    end(sleeper)
    server.stop._clock = time.monotonic
    server.guard_thread._without_store(RuntimeError("Connection reset"))
    assert server.stop.sentence == f"rank 0 is gone: its worker (pid {sleeper.pid}) has ended"
    assert server.left == [86]

    leaving = Server(Process.of("worker of rank 0", 0, sleeper.pid))
    leaving.guard_thread._leaving.set()
    leaving.guard_thread._without_store(RuntimeError("Connection reset"))
    assert leaving.stop.sentence == "" and not leaving.left
