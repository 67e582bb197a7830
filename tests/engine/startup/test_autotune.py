"""Autotuning: every tactic computes the same, all ranks choose alike, and a cache counts only where all have it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hybrid_moe_kernels.moe.reference import experts
from ranks import run_ranks

from hybrid_moe_ref.config import ConfigError, EngineConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.startup.autotune import TACTICS, ChosenExperts
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import NullObserver
from repro.lab.settings import RunSettings


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("num_rows", [0, 1, 60])
def test_every_tactic_computes_the_experts_that_are_held(tactic, num_rows):
    r = torch.Generator().manual_seed(num_rows)
    x_NH, weights_NK = (torch.randn(num_rows, n, generator=r, dtype=torch.float64) for n in (16, 4))
    ids_NK = torch.randint(-8, 16, (num_rows, 4), generator=r)  # of 24 experts, 0 to 7 are held here
    gate_up, down = (torch.randn(8, *n, generator=r, dtype=torch.float64) for n in ((12, 16), (16, 6)))
    y = ChosenExperts({64: tactic})(x_NH, weights_NK, ids_NK, gate_up, down)
    torch.testing.assert_close(y, experts(x_NH, weights_NK, ids_NK, gate_up, down), rtol=0, atol=1e-12)


class Issued(NullObserver):
    def __init__(self):
        self.timed = 0

    def enter(self, collective):
        self.timed += collective.layer.startswith("autotune.") and collective.layer != "autotune.vote"


def start(tmp_path, before=lambda rank: None):
    """Three ranks start with the same cache folder; how many timings each took part in, and what it chose."""

    def run(rank, store):
        before(rank)
        document = {"num_ranks": 3, "model": {"layer_pattern": "GA", "num_experts": 48}, "engine": {"autotune": True}}
        settings = RunSettings.from_document(document, {"scenario": "any", "variant": "control"}, "")
        server = settings.server()
        engine = dataclasses.replace(server.engine, cache_dir=str(tmp_path / "cache"))
        issued = Issued()
        comm = Communicator.connect(server.parallel, rank, store=store, observer=issued, timeout_s=60)
        started = Engine(dataclasses.replace(server, engine=engine), comm)
        return issued.timed, started.model.blocks[0].mlp.experts.mlp._chosen

    results = run_ranks(3, tmp_path, run)
    assert len({str(chosen) for _, chosen in results}) == 1, f"the ranks chose differently: {results}"
    return [timed for timed, _ in results], results[0][1]


def test_a_choice_is_remembered_when_all_have_it_and_measured_again_when_one_does_not(tmp_path):
    timings = len(TACTICS) * 2  # for the rows of a decode step and of a full one
    files = [tmp_path / "cache" / "autotune" / f"rank{rank}.json" for rank in range(3)]
    assert start(tmp_path)[0] == [timings] * 3
    kept = [path.read_text() for path in files]
    timed, chosen = start(tmp_path)
    assert timed == [0] * 3 and str(chosen) == str([(int(n), t) for n, t in json.loads(kept[0]).popitem()[1].items()])
    files[1].write_text("{ not JSON")
    files[2].write_text(
        json.dumps({key: {n: [t] for n, t in rows.items()} for key, rows in json.loads(kept[2]).items()})
    )
    assert start(tmp_path)[0] == [timings] * 3, "one rank without a usable file makes all measure"


@pytest.mark.full
def test_a_cache_that_cannot_be_written_costs_the_next_start_its_time_and_nothing_else(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert start(tmp_path)[0] == start(tmp_path)[0] == [len(TACTICS) * 2] * 3


def test_tuning_among_a_single_backend_is_refused():
    with pytest.raises(ConfigError, match="autotune: with moe_backend 'jit' there is only one way to compute"):
        EngineConfig(autotune=True, moe_backend="jit", dtype="float32")
