"""What a watch keeps of the silences of a run that ends well."""

from __future__ import annotations

from pathlib import Path

import pytest

from repro.layout import Identity
from repro.record import Recorder
from repro.rundir import RunDir
from repro.settings import RunSettings
from repro.verdict import Verdict
from repro.verdict.result import Position
from repro.watch import Watch
from repro.witness import create

SETTINGS = RunSettings("compile_skew", "fault", num_ranks=4, quiet_window_s=1.0)


def started(out: Path) -> tuple[RunDir, Watch]:
    run_dir = RunDir.create(out, "compile_skew", "fault", 0)
    for rank in range(4):
        create(run_dir.witness(rank), Identity(rank, 4))
    return run_dir, Watch(run_dir, SETTINGS, job_alive=lambda: True, reference_alive=lambda: True)


@pytest.mark.parametrize(
    ("waiting", "awaited", "kept_s"),
    [
        ("blocked", "building", 3.2),  # others stand in a collective: as long as they do, whatever it says of itself
        ("locked", "building", 0.0),  # they wait for its lock before the first step, and it gives signs of life
        ("blocked", "starting", 0.0),
    ],
)
def test_who_waits_in_a_collective_for_a_build_has_waited_however_lively_that_is(tmp_path, waiting, awaited, kept_s):
    run_dir, watch = started(tmp_path)
    builder = Recorder.open(run_dir.witness(3), 3, 4)
    builder.local("heartbeat", "torch.compile of RMSNorm")
    places = [*(Position(rank, waiting, since_s=3.2 + rank) for rank in range(3)), Position(3, awaited, since_s=0.4)]
    verdict = Verdict("slow", culprits=(3,), ranks=tuple(places), quiet_s=1.1)
    watch._remember(verdict)
    assert watch._slowest_s == kept_s
    assert watch._slowest is (verdict if kept_s else None)


def test_a_silence_without_signs_of_life_counts_by_its_length(tmp_path):
    _, watch = started(tmp_path)
    places = [*(Position(rank, "blocked", since_s=9.0) for rank in range(3)), Position(3, "running")]
    for quiet_s in (2.0, 4.0, 3.0):
        watch._remember(Verdict("slow", culprits=(3,), ranks=tuple(places), quiet_s=quiet_s))
    assert watch._slowest_s == 4.0
