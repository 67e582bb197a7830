"""What the watcher asks the system: lock holders, processor time, who is stopped, and which ranks are here at all."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scene import SMALL

from repro.hosts import collect, locks, processes
from repro.hosts.host import Host
from repro.hosts.system import STOPPED, System
from repro.store.run_dir import RunDir
from repro.store.schema import to_json, typed
from repro.trace.identity import myself
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import Witness, parse
from repro.trace.witness.format import pack_header
from repro.verdict import Facts, judge


@contextlib.contextmanager
def python(source: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``source`` and has printed a line."""
    started = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        assert started.stdout.readline()
        yield started
    finally:
        started.kill()
        started.wait()


HOLD = "print('held', flush=True)\nimport time\ntime.sleep(60)"
FLOCK = "import fcntl\nfile = open({!r}, 'w')\nfcntl.{}(file, fcntl.LOCK_EX)\n" + HOLD
BATON = "import os\nos.open({!r}, os.O_CREAT | os.O_EXCL)\n" + HOLD


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_the_holder_of_a_kernel_lock_is_found_among_those_who_have_it_open(tmp_path: Path, call: str) -> None:
    path = str(tmp_path / "build.lock")
    with open(path, "w"), python(FLOCK.format(path, call)) as holder:
        assert locks.holder(path) == holder.pid


def test_the_maker_of_a_baton_file_is_found_and_when_it_is_killed_nobody_holds_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with python(BATON.format(path)) as holder:
        assert locks.holder(path) == holder.pid
    assert os.path.exists(path)
    assert locks.holder(path) == locks.NOBODY
    with open(path):  # by a waiter that looks into it: then whether another has it open too, nothing tells
        assert locks.holder(path, [os.getpid()]) == locks.UNKNOWN


def test_a_holder_that_cannot_be_seen_is_unknown_and_not_nobody(tmp_path: Path, monkeypatch: Any) -> None:
    """As in another process namespace that shares the folder: the kernel still knows that the file is open."""
    path = str(tmp_path / "lock")
    with python(BATON.format(path)):
        monkeypatch.setattr("psutil.pids", lambda: [os.getpid()])
        assert locks.holder(path) == locks.UNKNOWN
    assert locks.holder(path) == locks.NOBODY


@pytest.mark.timeout(20)
def test_of_a_file_that_is_gone_or_a_lock_that_is_none_nothing_is_said(tmp_path: Path) -> None:
    assert locks.holder(tmp_path / "lock") == locks.UNKNOWN
    assert locks.holder("build") == locks.UNKNOWN
    os.mkfifo(tmp_path / "pipe")  # nobody writes to it, so opening it would wait for ever
    assert locks.holder(tmp_path / "pipe") == locks.UNKNOWN


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_the_launchers_log_is_not_waited_for(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.launcher_log.parent.mkdir()
    os.mkfifo(run_dir.launcher_log)
    assert collect.of_launcher(run_dir, [0]) == "rank 0 never began: logs/launcher.log says nothing"


def waiter(name: str, pid: int, rank: int = 0, num_ranks: int = 1, **writer: object) -> Witness:
    """The witness of a process that waits for a lock."""
    identity = dataclasses.replace(myself(rank, num_ranks), pid=pid, **writer)  # type: ignore[arg-type]
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        identity = dataclasses.replace(identity, pid_start_ticks=int(file.read().rpartition(")")[2].split()[19]))
    buffer = bytearray(SMALL.file_bytes)
    header = pack_header(identity, SMALL)
    buffer[: len(header)] = header
    recorder = Recorder(buffer, identity, SMALL)
    recorder.groups({"dp": range(num_ranks)})
    recorder.local("lock_wait", name)
    return parse(bytes(buffer), f"rank{rank:03d}.wit")


def test_a_stale_baton_is_a_deadlock_only_after_nobody_held_it_for_the_quiet_window(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    Path(path).touch()
    with python(HOLD) as waits:
        _stale_then_held(path, {0: waiter(path, waits.pid)})


def look(system: System, witnesses: dict[int, Witness]) -> Facts:
    """What a watcher does: first the processes, then what they wrote."""
    return system.look(witnesses, system.running({rank: witness.writer for rank, witness in witnesses.items()}))


class Clockwork(Host):
    """This host with a clock that a test turns, and processor times that it sets."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0
        self.used: dict[int, float] = {}
        self.starved: dict[int, float] = {}
        self.stolen_s = 0.0

    def now_ns(self) -> int:
        return int(self.now_s * 1e9)

    def cpu_seconds(self, pids: Iterable[int]) -> dict[int, float]:
        return {pid: self.used.get(pid, 0.0) for pid in pids}

    def starved_seconds(self, pid: int) -> float:
        return self.starved.get(pid, 0.0)

    def stolen_seconds(self) -> float:
        return self.stolen_s


def _stale_then_held(path: str, witnesses: dict[int, Witness]) -> None:
    host = Clockwork()
    system = System(1.0, host)
    assert look(system, witnesses).lock_holders == {}
    host.now_s += 1.0
    facts = look(system, witnesses)
    assert facts.lock_holders == {0: (path, 0)}
    now_ns = time.monotonic_ns() + 2_000_000_000
    verdict = judge(witnesses, facts, num_ranks=1, now_ns=now_ns, quiet_window_s=1.0)
    assert (verdict.verdict, verdict.cause, verdict.culprits) == ("deadlock", "lock", ())
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert look(system, witnesses).lock_holders == {0: (path, os.getpid())}
    assert look(system, witnesses).lock_holders == {}, "the time without a holder counts from its end"


def test_a_lock_held_by_a_child_of_a_rank_is_that_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with python(BATON.format(path)):
        witnesses = {0: waiter("other", os.getpid(), 0, 2), 1: waiter(path, os.getppid(), 1, 2)}
        assert look(System(1.0), witnesses).lock_holders == {1: (path, os.getpid())}


def test_the_work_of_a_process_that_a_rank_started_is_the_ranks() -> None:
    child = "import time; print(1, flush=True)\nwhile True: pass"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with python(HOLD) as asleep, python(parent) as busy:
        before = processes.cpu_seconds([asleep.pid, busy.pid])
        deadline = time.monotonic() + 60
        while (used := processes.cpu_seconds([asleep.pid, busy.pid]))[busy.pid] - before[busy.pid] < 0.05:
            assert time.monotonic() < deadline, used
            time.sleep(0.01)
        processes.kill(processes.with_descendants(busy.pid))


def test_the_kernel_says_how_long_a_process_had_no_processor() -> None:
    loop = "import os; os.sched_setaffinity(0, {0}); print('up', flush=True)\nwhile True: pass"
    with python(loop) as one, python(loop) as two:  # one processor for both
        deadline = time.monotonic() + 60
        while processes.starved_seconds(one.pid) + processes.starved_seconds(two.pid) < 0.05:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_processor_use_is_a_share_of_the_time_since_the_measurement_before() -> None:
    host = Clockwork()
    system = System(1.0, host)
    pids = {0: 10, 1: 11}
    system.measure(pids)
    assert (system.look({}, {}).cores, system.look({}, {}).starved) == ({}, {}), "one measurement says nothing"
    host.now_s += 0.5
    host.used, host.starved = {10: 0.25, 11: 0.0}, {11: 0.2}
    system.measure(pids)
    assert (system.look({}, {}).cores, system.look({}, {}).starved) == ({0: 0.5, 1: 0.0}, {0: 0.0, 1: 0.4})
    host.now_s += 0.05
    system.measure(pids)
    assert system.look({}, {}).cores == {}, "over 50 ms the kernel's ticks say nothing"


@pytest.mark.parametrize(("stolen_s", "late_s"), [(0.3, 0.0), (0.0, 0.3)])
def test_a_host_that_has_no_processor_to_spare_starves_its_ranks_although_their_own_accounts_are_clean(
    stolen_s: float, late_s: float
) -> None:
    host = Clockwork()
    system = System(1.0, host)
    system.begin_measuring({0: 10, 1: 11})
    host.now_s += 0.5
    host.starved, host.stolen_s = {10: 0.45}, stolen_s
    system.note_late(late_s)
    system.note_late(-0.001)
    system.measure({0: 10, 1: 11})
    assert system.look({}, {}).starved == {0: 0.9, 1: 0.6}


def test_stopped_and_ended_processes_are_told_and_those_of_other_hosts_are_not() -> None:
    with python(HOLD) as stopped:
        witnesses = {
            0: waiter("x", stopped.pid, 0, 3),
            1: waiter("x", stopped.pid, 1, 3, hostname="elsewhere"),
            2: waiter("x", stopped.pid, 2, 3, boot_id="another boot"),
        }
        assert look(System(1.0), witnesses).alive == {0: True}
        stopped.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while not (facts := look(System(1.0), witnesses)).excused and time.monotonic() < deadline:
            time.sleep(0.01)
        assert facts.excused == {0: STOPPED}
    assert look(System(1.0), witnesses).alive == {0: False}


def test_who_was_missed_first_is_remembered_and_of_those_missed_at_once_none_is_first() -> None:
    with python(HOLD) as first, python(HOLD) as second, python(HOLD) as third:
        started = [first, second, third]
        writers = {rank: waiter("x", it.pid, rank, 3).writer for rank, it in enumerate(started)}
        system = System(1.0)
        assert None not in system.running(writers).values()
        second.kill()
        second.wait()
        system.running(writers)
        for it in (first, third):
            it.kill()
            it.wait()
        assert system.look({}, {}).died.keys() == {1}
        system.running(writers)
        died = system.look({}, {}).died
        assert died[1] < died[0] == died[2]


def test_facts_survive_json() -> None:
    facts = Facts({0: True}, {1: STOPPED}, {2: ("a", 7)}, {0: 0.5}, {1: 0.25}, {1: 3.5}, {2: "other"}, {0: "stack"})
    assert typed(json.loads(json.dumps(to_json(facts))), Facts, "facts") == facts
