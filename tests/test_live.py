"""Live ranks that are slow in ways that look like hangs, and ranks that are ended: the right class each time."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from forked import run_forked

from repro.layout import Kind
from repro.record import Recorder
from repro.settings import RunSettings
from repro.witness import Tail

QUIET_S, SLOW_S = 0.5, 2.5


def settings(**changes):
    """Four ranks, four layers, a short quiet window."""
    document = {"num_ranks": 4, "model": {"layer_pattern": "GMAG"}, "engine": {"unfinished_interval": 16}}
    flags = {"scenario": "metadata_rebuild", "variant": "control", "quiet_window_s": QUIET_S, **changes}
    return RunSettings.from_document(document, flags, "")


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


def test_a_stopped_rank_is_slow_and_the_run_ends_clean(tmp_path):
    notices: list[str] = []

    def stop(run_dir, pids):
        def pause():
            wait_for_step(run_dir, 2, 3)
            os.kill(pids[2], signal.SIGSTOP)
            time.sleep(SLOW_S)
            os.kill(pids[2], signal.SIGCONT)

        threading.Thread(target=pause, daemon=True).start()

    _, document = run_forked(settings(), tmp_path, during=stop, notice=notices.append)
    assert document["verdict"] == "clean", document
    assert any("stopped by a signal" in line for line in slow_rank_named(notices, 2)), notices


def at_step_three(do):
    """Make rank 2 do something for SLOW_S at the start of step 3."""

    def in_rank(rank):
        if rank == 2:
            begin_step = Recorder.begin_step

            def slowly(self, step, schedule, num_live):
                if step == 3:
                    do()
                begin_step(self, step, schedule, num_live)

            Recorder.begin_step = slowly

    return in_rank


def spin():
    until = time.monotonic() + SLOW_S
    while time.monotonic() < until:
        pass


def hold_the_gil():
    ctypes.PyDLL(None).usleep(int(SLOW_S * 1e6))  # PyDLL keeps the GIL for the call


@pytest.mark.parametrize("do", [pytest.param(spin, marks=pytest.mark.full), hold_the_gil])
def test_a_rank_that_is_busy_with_itself_is_slow_and_the_run_ends_clean(tmp_path, do):
    notices: list[str] = []
    _, document = run_forked(settings(), tmp_path, in_rank=at_step_three(do), notice=notices.append)
    assert document["verdict"] == "clean", document
    assert slow_rank_named(notices, 2), notices


def test_a_run_whose_ranks_are_all_killed_is_a_crash(tmp_path):
    def kill_all(run_dir, pids):
        wait_for_step(run_dir, 0, 3)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    _, document = run_forked(settings(), tmp_path, during=kill_all)
    assert document["verdict"] == "crash" and document["cause"] == "dead_rank", document


def test_a_rank_whose_memory_is_not_there_is_told_with_its_message(tmp_path):
    def fail():
        raise MemoryError("no room for the state")

    _, document = run_forked(settings(), tmp_path, in_rank=at_step_three(fail))
    assert (document["verdict"], document["cause"], document["culprits"]) == ("crash", "error", [2]), document
    assert any("MemoryError: no room for the state" in line for line in document["evidence"]), document["evidence"]
    assert Path(tmp_path / "latest" / "logs" / "rank002.log").read_text().count("MemoryError") >= 1
