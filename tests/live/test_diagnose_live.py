"""`diagnose` on recorder dumps of live gloo jobs: class and rank; a slow rank differs from one that skipped a call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from live_gloo import FAULTS

from repro.ingest.read import read
from repro.verdict.partial import diagnose

pytestmark = pytest.mark.full
PROGRAM = Path(__file__).resolve().parents[1] / "support" / "jobs" / "live_gloo.py"
RIGHT = {
    "clean": ("clean", (), ()),
    "skip": ("deadlock", (2,), ()),
    "straggler": ("inconclusive", (), (2,)),
    "extra": ("deadlock", (2,), ()),
    "other": ("deadlock", (), (2,)),
    "order": ("deadlock", (2,), ()),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each fault's folder. The jobs mostly sleep, so all run at once."""
    root = tmp_path_factory.mktemp("live")
    quiet = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "2000"}
    jobs = {
        fault: subprocess.Popen([sys.executable, str(PROGRAM), fault, str(root / fault)], env=quiet) for fault in FAULTS
    }
    for fault, job in jobs.items():
        assert job.wait(timeout=120) == 0, fault
    return root


def judge(*paths):
    return diagnose(read(list(paths)).records)


@pytest.mark.parametrize("form", ["json", "pickle"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_set_of_dumps_gives_the_class_and_the_rank(folders, fault, form):
    diagnosis = judge(folders / fault / f"{form}0")
    assert (diagnosis.verdict, diagnosis.culprits, diagnosis.suspects) == RIGHT[fault], diagnosis


@pytest.mark.parametrize("forms", [("json0", "json1"), ("pickle0", "pickle1"), ("json0", "pickle1")])
def test_a_second_set_tells_the_straggler_from_the_rank_that_skipped(folders, forms):
    straggler = judge(*(folders / "straggler" / form for form in forms))
    assert (straggler.verdict, straggler.cause, straggler.culprits) == ("slow", "straggler", (2,)), straggler
    skip = judge(*(folders / "skip" / form for form in forms))
    assert (skip.verdict, skip.culprits) == ("deadlock", (2,)), skip
    assert any("nothing advanced" in note for note in skip.notes), skip


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_dump_of_one_rank_no_other_rank_is_named(folders, fault):
    for form, pattern in (("json0", "rank_{}.json"), ("pickle0", "trace_rank_{}")):
        for left_out in range(4):
            paths = [folders / fault / form / pattern.format(r) for r in range(4) if r != left_out]
            diagnosis = judge(*paths)
            assert set(diagnosis.culprits) <= set(RIGHT[fault][1]), (form, left_out, diagnosis)
            assert diagnosis.verdict in (RIGHT[fault][0], "inconclusive"), (form, left_out, diagnosis)
