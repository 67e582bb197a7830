"""torch.compile in the server: the tokens stay the same, one rank compiles for all, and a failure stops every rank."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time

import pytest
import torch
from folders import read_only
from ranks import run_ranks

from hybrid_moe_ref.config import preset
from hybrid_moe_ref.engine.lifecycle import Engine, PrepareFailed
from hybrid_moe_ref.engine.startup.builds import BuildPlace
from hybrid_moe_ref.engine.startup.compilation import Compiler, _Announcements
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch
from hybrid_moe_ref.parallel.observer import NullObserver
from repro.lab.outcome import reference
from repro.lab.settings import RunSettings

pytestmark = pytest.mark.timeout(300)  # a compiler on a busy machine

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")


class LocalEvents(NullObserver):
    """Phases, locks and builds, in order."""

    def __init__(self):
        self.events, self.now, self.beats = [], "", 0

    def phase(self, name):
        self.now = name

    def local(self, event, name, holder=-1):
        if event == "heartbeat":
            self.beats += 1
        else:
            self.events.append((self.now, event, name))


def settings_with(engine):
    document = {
        "num_ranks": 2,
        "model": {"layer_pattern": "GA", "num_experts": 16},
        "engine": {"compile": True, "unfinished_interval": 16, **engine},
    }
    return RunSettings.from_document(document, {"scenario": "any", "variant": "control"}, "")


def serve(tmp_path, settings, in_rank=lambda rank: None):
    def run(rank, store):
        in_rank(rank)
        seen, server = LocalEvents(), settings.server()
        engine = dataclasses.replace(server.engine, cache_dir=str(tmp_path / "cache"))
        comm = Communicator.connect(server.parallel, rank, store=store, observer=seen, timeout_s=280)
        try:
            served = Engine(dataclasses.replace(server, engine=engine), comm).serve(settings.requests()[rank])
        except PrepareFailed as error:
            seen.stopped_s = time.monotonic()
            return str(error), seen
        return served, seen

    return run_ranks(2, tmp_path, run, deadline_s=280)


@pytest.mark.full
@needs_compiler
@pytest.mark.parametrize("engine", [{}, {"mode": "graphs"}])
def test_compiled_ranks_serve_the_tokens_of_one_process_and_compile_before_they_serve(tmp_path, engine):
    settings = settings_with(engine)
    results = serve(tmp_path, settings)
    tokens = {name: output for served, _ in results for name, output in served.items()}
    assert tokens == reference.compute(settings), f"seed {settings.seed}"
    for _, seen in results:
        built = [name for _, event, name in seen.events if event == "build_begin"]
        assert len(built) == 6 and {"RMSNorm", "Router", "MLP"} == {name.split()[2].strip(",") for name in built}
        assert {phase for phase, event, _ in seen.events if event.startswith("build")} == {"compile"}, seen.events
    held = [rank for rank, (_, seen) in enumerate(results) for _, event, _ in seen.events if event == "lock_held"]
    assert held, "nobody took the lock"


def test_what_was_compiled_for_one_model_is_not_done_for_another(tmp_path):
    place = BuildPlace(tmp_path, 0, NullObserver())

    def done(dtype=torch.float32, **engine):
        return Compiler(HybridMoE(dataclasses.replace(preset("tiny"), **engine), dtype=dtype), place).done

    assert done() == done(layer_pattern="GAGA") != done(hidden_size=32) != done(dtype=torch.float64)


def test_no_part_is_compiled_any_more_once_another_rank_has_stopped_the_job(tmp_path):
    seen = LocalEvents()
    place = BuildPlace(tmp_path, 0, seen, stopped_by=lambda: "rank 1 could not prepare: no room")
    with pytest.raises(ScheduleMismatch, match="rank 1 could not prepare"), _Announcements(place).around("MLP", 1):
        pass
    assert not seen.events


@pytest.mark.full
@needs_compiler
def test_a_compiler_that_fails_on_one_rank_stops_all_with_its_reason(tmp_path):
    def without_compiler(rank):
        if rank == 1:
            os.environ["CXX"] = "/nonexistent/g++"
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    results = serve(tmp_path, settings_with({}), without_compiler)
    words = {text for text, _ in results}
    assert len(words) == 1, words
    assert "could not prepare: BuildFailed: torch.compile: " in words.pop()
    assert not list((tmp_path / "cache").rglob("*.lock"))


@pytest.mark.full
def test_a_folder_that_cannot_be_written_to_stops_all_that_would_compile(tmp_path):
    (tmp_path / "cache").mkdir()
    with read_only(tmp_path / "cache"):
        results = serve(tmp_path, settings_with({}))
    (words,) = {text for text, _ in results}
    assert "could not prepare: BuildFailed: cannot compile in " in words and "choose another folder" in words, words
    stopped_s = [seen.stopped_s for _, seen in results]
    assert max(stopped_s) - min(stopped_s) < 5, stopped_s
