"""What a watcher does when a look takes long, a read fails, the judge throws, or processes are not its host's."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from scene import Scene
from simulated_watch import World, make_run_dir
from simulator import Simulation
from written import written

from hybrid_moe_ref.parallel.observer import Collective
from repro.hosts import processes
from repro.hosts.agent import RemoteHosts
from repro.hosts.options import WatchOptions
from repro.hosts.system import System
from repro.store.run_dir import write_json
from repro.trace.identity import myself
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import create
from repro.trace.witness.format import Identity
from repro.verdict.facts import Facts
from repro.watch.comparison import Comparison
from repro.watch.look import Look
from repro.watch.offline import judge_files

CALL = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")
OPTIONS = WatchOptions(num_ranks=2, quiet_window_s=1.0, deadline_s=20.0)
GO_ON = [("call", CALL), ("sleep", 20_000_000)]


def world_of(root: Path, programs: list[list[Any]], **options: Any) -> World:
    run_dir = make_run_dir(root / "run")
    sim = Simulation(programs, {"dp": [tuple(range(len(programs)))]}, folder=run_dir.root)
    return World(sim, run_dir, dataclasses.replace(OPTIONS, num_ranks=len(programs), **options), 1)


def hang() -> list[list[Any]]:
    """Rank 1 does not come to the second collective."""
    return [[("call", CALL), ("call", CALL)], [("call", CALL)]]


def test_the_time_that_a_look_takes_is_no_silence_of_the_ranks(tmp_path: Path) -> None:
    """Many processes, or a thousand witnesses, take longer to read than a quiet window."""
    world = world_of(tmp_path, [GO_ON * 400, GO_ON * 400], deadline_s=3.0)
    world.hosts[0].look_s = 0.6
    document = written(world.watch().run())
    assert document["verdict"] not in ("stall", "deadlock"), document
    assert document["quiet_s"] < 0.1, document


def failing(times: int, error: Exception) -> tuple[Callable[..., Any], list[int]]:
    left = [times]

    def fail(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        raise error

    return fail, left


def owner_of(site: str) -> tuple[Any, str]:
    """The module or class that has a name, and the name in it."""
    path, _, name = site.rpartition(".")
    owner: Any = __import__(path.split(".")[0])
    for part in path.split(".")[1:]:
        owner = getattr(owner, part)
    return owner, name


READS = [
    ("repro.trace.witness.file.read", "a witness is read"),
    ("repro.trace.witness.file.Tail.last_event", "its last event is read"),
    ("repro.trace.witness.file.Tail.writer", "its writer is read"),
    ("repro.trace.witness.file.Tail.__init__", "it is mapped"),
    ("simulated_watch.SimulatedHost.find", "a process is looked for"),
    ("simulated_watch.SimulatedHost.is_stopped", "its state is read"),
    ("simulated_watch.SimulatedHost.cpu_seconds", "its processor time is read"),
    ("simulated_watch.SimulatedHost.starved_seconds", "its waiting time is read"),
    ("simulated_watch.SimulatedHost.stolen_seconds", "the host's stolen time is read"),
    ("simulated_watch.SimulatedHost.lock_holder", "a lock's holder is looked for"),
    ("simulated_watch.SimulatedHost.collect", "evidence is asked for"),
    ("repro.hosts.agent.read_json", "another host's agent is heard"),
    ("repro.hosts.agent.latest_request", "an evidence request is numbered"),
    ("repro.watch.flight_recorder.read_json", "a dump is read"),
    ("repro.hosts.collect.read_text", "the launcher's log is read"),
]
ERRORS = [OSError(code, os.strerror(code)) for code in (errno.ESTALE, errno.EIO, errno.EMFILE)]


@pytest.mark.parametrize("error", ERRORS, ids=["ESTALE", "EIO", "EMFILE"])
@pytest.mark.parametrize(("site", "when"), READS)
def test_reads_that_fail_for_a_moment_change_no_verdict(tmp_path, monkeypatch, site, when, error):
    world = world_of(tmp_path, hang())
    owner, name = owner_of(site)
    works, left = getattr(owner, name), [3]

    def fails_thrice(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error
        return works(*args, **options)

    monkeypatch.setattr(owner, name, fails_thrice)
    document = written(world.watch().run())
    assert (document["verdict"], document["culprits"]) in [("deadlock", [1]), ("deadlock", [])], f"{when}: {document}"
    assert json.loads(world.run_dir.verdict.read_text()) == document


@pytest.mark.parametrize(("site", "when"), READS)
def test_reads_that_fail_for_good_end_in_a_verdict_that_names_nobody(tmp_path, monkeypatch, site, when):
    world = world_of(tmp_path, hang(), deadline_s=3.0)
    fail, _ = failing(1 << 30, ERRORS[0])
    monkeypatch.setattr(site, fail)
    document = written(world.watch().run())
    assert document["verdict"] in ("inconclusive", "deadlock"), f"{when}: {document}"
    assert document["verdict"] == "deadlock" or document["culprits"] == [], f"{when}: {document}"
    assert document["verdict"] == "deadlock" or any("Stale" in line for line in document["evidence"]), document
    assert json.loads(world.run_dir.verdict.read_text()) == document


@pytest.mark.parametrize(
    "site", ["repro.watch.look.judge", "repro.watch.live.compare_dumps", "repro.watch.silences.Silences.remember"]
)
def test_a_slip_of_ours_is_a_verdict_of_its_own_with_the_traceback_in_a_log_and_the_evidence_taken(
    tmp_path, monkeypatch, site
):
    world = world_of(tmp_path, [GO_ON * 400, [*GO_ON, ("spin",)]] if "Silences" in site else hang())
    monkeypatch.setattr(site, lambda *args, **options: {}["slip"])
    document = written(world.watch().run())
    assert (document["verdict"], document["culprits"], document["confidence"]) == ("inconclusive", [], "undecided")
    assert "the watcher failed, so nothing is known about the run: KeyError: 'slip'" in document["evidence"][0]
    assert "logs/watcher.log" in document["evidence"][0]
    assert "Traceback" in world.run_dir.watcher_log.read_text()
    assert world.hosts[0].asked[-1] == {0: 100, 1: 101}
    monkeypatch.undo()
    again = judge_files(world.run_dir, world.options, Comparison()).verdict.verdict
    assert again == ("slow" if "Silences" in site else "deadlock"), "what failed then can be judged now"
    assert json.loads(world.run_dir.verdict.read_text()) == document


def test_of_two_errors_the_first_is_named_and_the_log_has_both(tmp_path, monkeypatch):
    """The second one comes when the watcher, after the first, takes its last look."""
    world = world_of(tmp_path, hang())
    monkeypatch.setattr("repro.watch.look.judge", lambda *args, **options: {}["slip"])
    monkeypatch.setattr(world.hosts[0], "collect", failing(1, ValueError("later"))[0])
    document = written(world.watch().run())
    assert "KeyError: 'slip'" in document["evidence"][0] and "later" not in document["evidence"][0], document
    assert "not all evidence could be collected" in document["evidence"], document
    log = world.run_dir.watcher_log.read_text()
    assert "KeyError: 'slip'" in log and "ValueError: later" in log


def test_a_comparison_that_throws_is_a_verdict_too(tmp_path):
    world = world_of(tmp_path, [[("call", CALL)], [("call", CALL)]])
    document = written(world.watch(compare=lambda final: Comparison(wrong=("",)[1])).run())  # type: ignore[arg-type]
    assert document["verdict"] == "inconclusive" and "IndexError" in document["evidence"][0], document


def test_a_header_that_is_being_written_ends_no_watch(tmp_path, monkeypatch):
    world = world_of(tmp_path, hang())
    path = world.run_dir.witness(1)
    header = path.read_bytes()[:200]
    watch = world.watch()
    watch._poll()
    with path.open("r+b") as file:
        file.write(header[:100] + bytes(100))
    assert watch._poll() is None
    with path.open("r+b") as file:
        file.write(header)
    assert watch.run().verdict == "deadlock"


def test_a_process_that_the_system_does_not_show_is_not_dead(tmp_path, monkeypatch):
    """With no descriptor left, /proc cannot be read: that is no death."""
    me = myself(0, 1)
    system = System(1.0)
    assert system.running({0: me})[0] is not None
    descriptors = OSError(errno.EMFILE, "Too many open files")
    monkeypatch.setattr(processes, "read_start_ticks", failing(1, descriptors)[0])
    with pytest.raises(OSError, match="Too many"):
        system.running({0: me})
    monkeypatch.setattr(processes.psutil, "Process", failing(1, psutil.NoSuchProcess(me.pid))[0])
    monkeypatch.setattr(processes.os, "kill", failing(1, PermissionError())[0])
    monkeypatch.setattr(processes.os.path, "exists", lambda path: False)
    assert system.running({0: me}) == {}, "hidden from this user"


def test_pids_of_another_process_namespace_are_not_looked_up_in_this_one(tmp_path):
    """Two containers of one node may share boot id and host name."""
    here = myself(0, 2)
    assert here.pid_namespace
    there = dataclasses.replace(here, rank=1, pid=2**22 + 1, pid_namespace=here.pid_namespace + 1)
    assert System(1.0).running({0: here, 1: there}).keys() == {0}
    before = dataclasses.replace(there, pid_namespace=0)
    assert System(1.0).running({1: before}) == {1: None}, "a version that did not say"


def test_a_rank_of_another_process_namespace_is_not_taken_for_the_holder_of_a_lock_by_its_pid():
    scene = Scene(2, {"dp": (0, 1)})
    scene.recorders[0].local("lock_wait", "/cache/x.lock", holder=101)  # in its own namespace
    scene.enter([1], CALL)
    witnesses = scene.witnesses()
    assert witnesses[1].writer.pid == 101
    for namespaces, culprits in (((1, 1), (1,)), ((1, 2), ())):
        seen = {
            rank: dataclasses.replace(
                witness, writer=dataclasses.replace(witness.writer, pid_namespace=namespaces[rank])
            )
            for rank, witness in witnesses.items()
        }
        facts = Facts(lock_holders={0: ("/cache/x.lock", 101)})
        verdict = Look(witnesses[0].writer, scene.now_ns + 2 * 10**9, seen, facts).verdict(OPTIONS)
        assert verdict.culprits == culprits, verdict


@pytest.mark.parametrize("quiet_window_s", [0.2, 1.0])
def test_a_launcher_that_a_signal_ended_names_no_rank(tmp_path, quiet_window_s):
    """torchrun ends all ranks for it; which of them goes first says nothing."""
    for line, wanted in (("Received 2 death signal, shutting down workers", "inconclusive"), ("", "crash")):
        programs = [[("call", CALL), ("kill",)], [*GO_ON, ("spin",)]]
        world = world_of(tmp_path / wanted, programs, quiet_window_s=quiet_window_s)
        world.run_dir.launcher_log.write_text(f"W1128 api.py:753] {line}\n")
        document = written(world.watch().run())
        assert document["verdict"] == wanted, document
        assert document["culprits"] == ([] if line else [0]), document
    assert not document["ended_by"]


AGENT_READS = [(site, when) for site, when in READS if not site.startswith(("repro.flight", "repro.hosts.collect"))]


@pytest.mark.parametrize(("site", "when"), AGENT_READS)
def test_an_agent_whose_reads_fail_for_a_moment_still_writes_its_status_and_ends_its_ranks(
    tmp_path, monkeypatch, site, when
):
    run_dir = make_run_dir(tmp_path / "run")
    sim = Simulation(hang(), {"dp": [(0, 1)]}, folder=run_dir.root, hosts=2)
    world = World(sim, run_dir, OPTIONS, 2)
    agent, owner, name = world.agent(1), *owner_of(site)
    works, left = getattr(owner, name), [3]

    def fails_thrice(*args: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise ERRORS[0]
        return works(*args, **options)

    monkeypatch.setattr(owner, name, fails_thrice)
    advance, others = world.advance, RemoteHosts(run_dir, world.hosts[0])
    heard = []

    def decide_after_three_seconds(duration_s: float) -> None:
        advance(duration_s)
        if sim.now_ns > 3e9 and not run_dir.verdict.exists():
            heard.extend(others.statuses())
            write_json(run_dir.verdict, {})

    monkeypatch.setattr(world, "advance", decide_after_three_seconds)
    agent.run()
    assert [status.ranks for status in heard] == [(1,)], when
    assert sim.ranks[1].state == "dead" and sim.ranks[0].state != "dead", when


def test_what_the_watcher_cannot_open_at_first_it_opens_later(tmp_path):
    root = make_run_dir(tmp_path / "run").root
    world = World(Simulation(hang(), {"dp": [(0, 1)]}, folder=root), make_run_dir(tmp_path / "other"), OPTIONS, 1)
    watch = world.watch()
    assert watch._poll() is None and not watch.all_done()
    for rank in range(2):
        create(world.run_dir.witness(rank), Identity(rank, 2))
        Recorder.open(world.run_dir.witness(rank), rank, 2).done()
    assert watch._poll() is not None and len(watch._tails.opened()) == 2


def test_a_verdict_for_which_the_disk_has_no_room_is_at_least_shown(tmp_path: Path, monkeypatch: Any) -> None:
    def full(path: Path, value: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    world = world_of(tmp_path, hang())
    monkeypatch.setattr("repro.watch.live.write_json", full)
    shown: list[str] = []
    with pytest.raises(OSError, match="No space left on device"):
        world.watch(notice=shown.append).run()
    assert shown[-1].startswith("deadlock: rank 0 waits in dp all_reduce #2"), shown
    assert shown[-1].endswith("verdict.json could not be written: No space left on device"), shown
