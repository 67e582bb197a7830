"""A run that is judged from its files: one without a verdict as of now, one with a verdict as it was then."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from simulated_watch import World, make_run_dir
from simulator import Simulation

from hybrid_moe_ref.parallel.observer import Collective
from repro.hosts.options import WatchOptions
from repro.store.run_dir import RunDir, write_json
from repro.store.schema import to_json
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.file import create
from repro.trace.witness.format import Geometry, Identity
from repro.watch import offline
from repro.watch.comparison import Comparison
from repro.watch.document import read_document, undecided
from repro.watch.offline import judge_files

CALL = Collective("dp", "all_reduce", "step", (4,), "int32", "sum")
TINY = Geometry(ring_records=32, vector_words=64, string_bytes=512, group_slots=4)
OPTIONS = WatchOptions(2, 0.01, 60.0)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """Two ranks, both this process: rank 0 waits for rank 1, which is done. Nobody watches them."""
    monkeypatch.setattr(offline, "LOOK_S", 0.02)
    run_dir = make_run_dir(tmp_path)
    run_dir.config.write_text("{}")
    for rank in range(2):
        recorder = Recorder.open(run_dir.witness(rank), rank, 2, run_id="run", shape=TINY)
        recorder.groups({"dp": (0, 1)})
        recorder.phase("serve")
        recorder.done() if rank else recorder.enter(CALL)
    return run_dir


def test_a_run_without_a_verdict_is_judged_as_of_now(run_dir: RunDir) -> None:
    again = judge_files(run_dir, OPTIONS, Comparison())
    assert again.verdict.verdict == "deadlock" and again.decided is None and again.whole, again.verdict.evidence
    assert [(position.rank, position.state) for position in again.verdict.ranks] == [(0, "blocked"), (1, "done")]
    assert again.look.facts.alive == {0: True, 1: True}
    assert not any("prepared" in line for line in again.verdict.evidence)


def test_a_damaged_verdict_is_named_and_the_run_is_judged_without_it(run_dir: RunDir) -> None:
    run_dir.verdict.write_text('{"verdict": 3}')
    again = judge_files(run_dir, OPTIONS, Comparison())
    (line,) = (line for line in again.verdict.evidence if line.startswith("verdict.json:1: "))
    assert line.endswith("; the run is judged as if it had no verdict.json")
    assert again.verdict.verdict == "deadlock" and again.decided is None and not again.whole


def test_a_run_whose_ranks_never_began_says_how_old_it_is_and_who_watches_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(offline, "LOOK_S", 0.02)
    run_dir = make_run_dir(tmp_path)
    run_dir.config.write_text("{}")
    os.utime(run_dir.config, (time.time() - 90, time.time() - 90))
    for rank in range(2):
        create(run_dir.witness(rank), Identity(rank, 2, "run"), TINY)
    for holder, words in ((0, "no process was found that watches it"), (77, "process 77 watches it")):
        monkeypatch.setattr(offline.locks, "holder", lambda path, pid=holder: pid)
        again = judge_files(run_dir, OPTIONS, Comparison())
        (line,) = (line for line in again.verdict.evidence if line.startswith("the run was prepared 9"))
        assert f" s ago, and {words}" in line and again.verdict.verdict == "inconclusive"


@pytest.fixture
def clean(tmp_path: Path) -> World:
    """A watched run whose ranks finished."""
    run_dir = make_run_dir(tmp_path)
    programs = [[("phase", "serve"), ("call", CALL)]] * 2
    world = World(Simulation(programs, {"dp": [(0, 1)]}, folder=run_dir.root), run_dir, WatchOptions(2, 1.0, 20.0), 1)
    assert world.watch().run().verdict == "clean"
    return world


@pytest.mark.parametrize(
    ("before", "comparison", "verdict", "evidence"),
    [
        ("clean", Comparison(), "clean", []),
        ("clean", Comparison(evidence="all equal"), "clean", ["all equal"]),
        ("clean", Comparison(missing="no outputs"), "clean", []),  # its watcher has compared them
        ("deadlock", Comparison(missing="no outputs"), "inconclusive", ["no outputs, so the tokens were not compared"]),
        ("slow", Comparison(missing="no outputs"), "slow", ["rank 1 built for 9 s"]),  # files do not show slowness
        ("clean", Comparison(wrong=("rank 0: 1 token differs",)), "corrupt", ["rank 0: 1 token differs"]),
    ],
)
def test_finished_ranks_have_what_their_watcher_saw_and_what_is_compared_now(
    clean: World, before: str, comparison: Comparison, verdict: str, evidence: list[str]
) -> None:
    decided = read_document(clean.run_dir.verdict)
    decided = structs.replace(decided, verdict=before, culprits=(1,), evidence=("rank 1 built for 9 s",))
    write_json(clean.run_dir.verdict, to_json(decided))
    again = judge_files(clean.run_dir, clean.options, comparison).verdict
    assert again.verdict == verdict and again.culprits == ((1,) if verdict == "slow" else ())
    assert [line for line in again.evidence if line in evidence] == evidence
    assert ("rank 1 built for 9 s" in again.evidence) == (verdict == "slow")


@pytest.mark.parametrize(
    ("field", "line"),
    [({"interrupted": True}, "the run was interrupted before it was decided"), ({"ended_by": "SIGTERM"}, "SIGTERM")],
)
def test_how_a_watch_ended_stays_with_its_verdict(clean: World, field: dict[str, Any], line: str) -> None:
    write_json(clean.run_dir.verdict, to_json(structs.replace(read_document(clean.run_dir.verdict), **field)))
    assert line in judge_files(clean.run_dir, clean.options, Comparison()).verdict.evidence


def test_a_verdict_without_its_watcher_is_judged_at_the_moment_that_its_silence_gives(tmp_path: Path) -> None:
    """As an older release wrote it. The last rank is on a host with another clock."""
    run_dir = make_run_dir(tmp_path)
    programs = [[("phase", "serve"), ("call", CALL)], [("phase", "serve")]]
    sim = Simulation(programs, {"dp": [(0, 1)]}, folder=run_dir.root, hosts=2, seed=3)
    world = World(sim, run_dir, WatchOptions(2, 1.0, 20.0), 2)
    world.add_agents([1])
    before = world.watch().run()
    assert before.verdict == "deadlock"
    document = json.loads(run_dir.verdict.read_text())
    del document["watcher"]
    run_dir.verdict.write_text(json.dumps(document))
    again = judge_files(run_dir, world.options, Comparison()).verdict
    assert (again.verdict, again.cause, again.culprits) == (before.verdict, before.cause, before.culprits)
    assert again.quiet_s == pytest.approx(before.quiet_s, abs=0.7)  # the clocks of the hosts are 0.3 s off


def test_the_document_of_an_undecided_run_has_its_settings_and_no_class() -> None:
    document = undecided(scenario="idle_skip", variant="fault", backend="gloo", num_ranks=4, seed=7)
    assert (document.verdict, document.confidence, document.culprits) == ("", "", ())
    assert (document.scenario, document.num_ranks, document.seed) == ("idle_skip", 4, 7)
