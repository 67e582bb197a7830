"""Runs of one command, one after another."""

from __future__ import annotations

import errno

import pytest

from repro.hosts.interrupt import Interrupt
from repro.lab.scenarios import settings_of
from repro.lab.start import launch
from repro.lab.start.kernel_cache import CannotFill
from repro.lab.start.series import Series
from repro.store.run_dir import OutputError, RunDir


def settings(variant="fault", seed=0):
    return settings_of({"scenario": "metadata_rebuild", "variant": variant, "seed": seed})


@pytest.fixture
def references(monkeypatch, tmp_path):
    """The single-process reference that each run of a series was given; each run leaves one of its own."""
    given = []

    def run(settings, out, interrupt, display, start, reference):
        given.append(reference)
        return RunDir(tmp_path / str(len(given))), launch.skipped(settings, "")

    monkeypatch.setattr(launch, "run", run)
    return given


def series(tmp_path):
    return Series(tmp_path, lambda *args: pytest.fail("starts"), Interrupt())


def test_runs_with_the_same_requests_share_one_reference(tmp_path, references):
    runs = series(tmp_path)
    for one in (settings("control"), settings("fault"), settings("fault", seed=1), settings("fix")):
        runs.run(one)
    first = tmp_path / "1" / "reference.json"
    assert references == [None, first, None, first]


def test_a_reference_that_stands_in_for_the_real_one_is_used_for_that_run_alone(tmp_path, references):
    runs = series(tmp_path)
    runs.run(settings("fault"), reference=tmp_path / "none.json")
    runs.run(settings("fix"))
    assert references == [tmp_path / "none.json", None]


def test_a_run_that_is_not_possible_says_what_is_missing_and_the_next_one_runs(tmp_path, references, monkeypatch):
    runs, possible = series(tmp_path), launch.run

    def fail(*args):
        raise CannotFill("no compiler")

    monkeypatch.setattr(launch, "run", fail)
    run_dir, document = runs.run(settings())
    assert (run_dir, document.verdict, document.skipped) == (None, "inconclusive", "no compiler")
    monkeypatch.setattr(launch, "run", possible)
    assert runs.run(settings())[0] == RunDir(tmp_path / "1") and references == [None]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OutputError("cannot write to /runs: no space left on device; choose another --out"), "choose another --out"),
        (OSError(errno.ENOSPC, "No space left on device", "/runs/a/verdict.json"), "/runs/a/verdict.json: No space"),
    ],
)
def test_a_full_disk_costs_the_runs_before_it_nothing(tmp_path, references, monkeypatch, error, message):
    def fail(*args):
        raise error

    runs, possible = series(tmp_path), launch.run
    monkeypatch.setattr(launch, "run", fail)
    with pytest.raises(type(error)):
        runs.run(settings())  # there is no table yet
    monkeypatch.setattr(launch, "run", possible)
    runs.run(settings())
    monkeypatch.setattr(launch, "run", fail)
    run_dir, document = runs.run(settings("fix"))
    assert run_dir is None and document.verdict == "inconclusive" and message in document.skipped
