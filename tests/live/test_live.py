"""Live ranks that are slow in ways that look like hangs, and ranks that are ended: the right class each time."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from forked import in_time, run_forked

from repro.hosts.processes import is_stopped
from repro.lab.settings import RunSettings
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import Tail
from repro.trace.witness.format import Kind

QUIET_S, SLOW_S = 0.5, 1.8
REPEATS = int(os.environ.get("HMR_LIVE_REPEATS", "10"))
"""How often each way is tried with eight ranks and five seconds by the thorough tests."""

WAYS = [
    pytest.param(4, 1, id="4 ranks"),
    pytest.param(8, REPEATS, id="8 ranks", marks=[pytest.mark.full, pytest.mark.timeout(1800)]),
]


def settings(num_ranks=4, **changes):
    """Four layers and a short quiet window."""
    document = {"num_ranks": num_ranks, "model": {"layer_pattern": "GMAG"}, "engine": {"unfinished_interval": 16}}
    quiet_s = 1.0 if num_ranks == 8 else QUIET_S
    flags = {"scenario": "metadata_rebuild", "variant": "control", "quiet_window_s": quiet_s, **changes}
    return RunSettings.from_document(document, flags, "")


def slow_s(num_ranks):
    return 5.0 if num_ranks == 8 else SLOW_S


def wait_for_step(run_dir, rank, step):
    tail = Tail(run_dir.witness(rank))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        event = tail.last_event()
        if event and event.step >= step and event.kind in (Kind.ENTER, Kind.LEAVE):
            return
        time.sleep(0.002)
    raise AssertionError(f"rank {rank} did not come to step {step}")


def slow_rank_named(notices, rank):
    return [line for line in notices if line.startswith("slow: ") and f"rank {rank} " in line]


def at_step_three(do, rank=2):
    """Make a rank do something at the start of step 3; ``do`` may want its recorder."""
    odd = rank

    def in_rank(rank):
        if rank == odd:
            begin_step = Recorder.begin_step

            def slowly(self, step, schedule, num_live):
                if step == 3:
                    do(self)
                begin_step(self, step, schedule, num_live)

            Recorder.begin_step = slowly

    return in_rank


def signal_itself(number):
    return lambda recorder: os.kill(os.getpid(), number)


def said_to_be_stopped(notices, rank):
    return any("stopped by a signal" in line for line in slow_rank_named(notices, rank))


def continued(rank, after_s, notices):
    """Let a rank that stops itself go on so much later, and not before the watcher has said that it is stopped."""

    def during(run_dir, pids):
        def go_on():
            deadline = time.monotonic() + 60
            while not is_stopped(psutil.Process(pids[rank])) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(after_s)
            while not said_to_be_stopped(notices, rank) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(pids[rank], signal.SIGCONT)

        threading.Thread(target=go_on, daemon=True).start()

    return during


@pytest.mark.parametrize(("num_ranks", "repeats"), WAYS)
def test_a_stopped_rank_is_slow_and_the_run_ends_clean(tmp_path, num_ranks, repeats):
    for _ in range(repeats):
        notices: list[str] = []

        in_rank = at_step_three(signal_itself(signal.SIGSTOP))
        during = continued(2, slow_s(num_ranks), notices)
        _, document = run_forked(settings(num_ranks), tmp_path, in_rank=in_rank, during=during, notice=notices.append)
        assert document["verdict"] == "clean", document
        assert said_to_be_stopped(notices, 2), notices


def spin(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def hold_the_gil(seconds):
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL keeps the GIL for the call


@pytest.mark.parametrize(("num_ranks", "repeats"), WAYS)
@pytest.mark.full
@pytest.mark.parametrize("do", [spin, hold_the_gil])
def test_a_rank_that_is_busy_with_itself_is_slow_and_the_run_goes_on(tmp_path, do, num_ranks, repeats):
    for _ in range(repeats):
        notices: list[str] = []
        in_rank = at_step_three(lambda recorder: do(slow_s(num_ranks)))
        _, document = run_forked(settings(num_ranks), tmp_path, in_rank=in_rank, notice=notices.append)
        assert slow_rank_named(notices, 2), notices
        if document["verdict"] != "clean":  # where it was seen through three quiet windows, that is the last word
            assert (document["verdict"], document["culprits"]) == ("slow", [2]), document
            assert "then all ranks finished" in document["evidence"], document


@pytest.mark.parametrize(("num_ranks", "repeats"), WAYS)
def test_a_rank_that_is_killed_is_the_culprit_of_the_crash(tmp_path, num_ranks, repeats):
    for _ in range(repeats):
        in_rank = at_step_three(signal_itself(signal.SIGKILL), rank=1)
        run_dir, document = run_forked(settings(num_ranks), tmp_path, in_rank=in_rank)
        assert (document["verdict"], document["cause"]) == ("crash", "dead_rank"), document
        assert document["culprits"] == [1], document
        # A death is reported before the quiet window ends, but after the other ranks had time to report.
        assert in_time(run_dir, document, settings(num_ranks).quiet_window_s + 1.0, settings(num_ranks)), document


@pytest.mark.full
def test_a_run_whose_ranks_are_all_killed_is_a_crash(tmp_path):
    def kill_all(run_dir, pids):
        wait_for_step(run_dir, 0, 3)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    _, document = run_forked(settings(), tmp_path, during=kill_all)
    assert document["verdict"] == "crash" and document["cause"] == "dead_rank", document


def test_a_rank_whose_memory_is_not_there_is_told_with_its_message(tmp_path):
    def fail(recorder):
        raise MemoryError("no room for the state")

    _, document = run_forked(settings(), tmp_path, in_rank=at_step_three(fail))
    assert (document["verdict"], document["cause"], document["culprits"]) == ("crash", "error", [2]), document
    assert any("MemoryError: no room for the state" in line for line in document["evidence"]), document["evidence"]
    assert Path(tmp_path / "latest" / "logs" / "rank002.log").read_text().count("MemoryError") >= 1


@pytest.mark.full
def test_a_baton_whose_maker_is_gone_is_a_deadlock_that_blames_no_rank_and_names_the_file(tmp_path):
    baton = tmp_path / "lock"
    baton.touch()

    def wait(recorder):
        recorder.local("lock_wait", str(baton), 4711)
        while baton.exists():
            time.sleep(0.1)

    _, document = run_forked(settings(), tmp_path, in_rank=at_step_three(wait))
    assert (document["verdict"], document["cause"], document["culprits"]) == ("deadlock", "lock", []), document
    assert f"no process holds lock {baton} any more, for which rank 2 waits" in document["evidence"], document
    assert document["system"]["lock_holders"] == {"2": [str(baton), 0]}


@pytest.mark.full
def test_a_baton_that_another_program_holds_is_slow_until_it_lets_go(tmp_path):
    baton = tmp_path / "lock"
    source = f"import os, time; os.open({str(baton)!r}, os.O_CREAT | os.O_EXCL); time.sleep(60)"
    notices: list[str] = []

    def wait(recorder):
        recorder.local("lock_wait", str(baton))
        while baton.exists():
            time.sleep(0.1)
        recorder.local("lock_freed", str(baton))

    def let_go(run_dir, pids):
        def later():
            tail = Tail(run_dir.witness(2))
            while (event := tail.last_event()) is None or event.kind != Kind.LOCK_WAIT:
                time.sleep(0.01)
            time.sleep(SLOW_S)
            baton.unlink()
            stranger.kill()

        threading.Thread(target=later, daemon=True).start()

    stranger = subprocess.Popen([sys.executable, "-c", source])
    try:
        while not baton.exists():
            assert stranger.poll() is None
            time.sleep(0.01)
        in_rank = at_step_three(wait)
        _, document = run_forked(settings(), tmp_path, in_rank=in_rank, during=let_go, notice=notices.append)
    finally:
        stranger.kill()
        stranger.wait()
    assert any(line.startswith("slow: ") and "rank 2 waits for lock" in line for line in notices), notices
    text = " ".join(document["evidence"])
    if document["verdict"] != "clean":  # as above
        assert document["verdict"] == "slow" and document["culprits"] == [], document
        assert f"process {stranger.pid}, which is not a rank, holds" in text, document
        assert f"process {stranger.pid} runs for" in text, document
