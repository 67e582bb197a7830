"""The server with drafts: whatever the drafter says, in every layout, the tokens of one process and the planned
collectives."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cut_models import CONFIG, SEED
from diary import Diary
from ranks import run_ranks
from test_layouts import ENGINE, REQUESTS

from hybrid_moe_ref.config import ConfigError, EngineConfig, ParallelConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.policies import DraftPolicy, Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch

MODEL = dataclasses.replace(CONFIG, num_mtp_layers=1)
DRAFTS = dataclasses.replace(ENGINE, num_drafts=2)


def wanted_tokens(requests):
    model = HybridMoE(MODEL, device="meta", dtype=torch.float64).init_weights(SEED)
    return {r.request_id: model.generate(torch.tensor([r.prompt]), r.max_new_tokens)[0].tolist() for r in requests}


def guess_well(engine, wanted, error):
    """After every drafting, put the right tokens in the drafts' place, some of them wrong; the same on tp ranks."""
    draft, right = engine._drafting.draft, []

    def draft_well(running, *step):
        draft(running, *step)
        for request in running:
            done, name = len(request.output), request.request.request_id
            chance = random.Random(f"{SEED} {name} {done}")
            answer = wanted[name][done : done + len(request.drafts)]
            request.drafts = [token if chance.random() >= error else (token + 1) % 61 for token in answer]
            right.append(request.drafts == answer != [])

    engine._drafting.draft = draft_well
    return right


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "expert_parallel", "error", "engine"),
    [
        (2, 1, True, 0.3, DRAFTS),
        (2, 1, True, 0.3, dataclasses.replace(DRAFTS, mode="graphs", microbatch_tokens=4)),
        (2, 2, True, None, DRAFTS),
        (1, 2, False, 0.3, DRAFTS),
    ],
)
def test_drafts_change_no_token_and_no_schedule(tmp_path, dp_size, tp_size, expert_parallel, error, engine):
    config = ServerConfig(MODEL, ParallelConfig(dp_size, tp_size, expert_parallel), engine, SEED)
    wanted = wanted_tokens([request for requests in REQUESTS for request in requests])

    def run(rank, store):
        diary = Diary()
        comm = Communicator.connect(config.parallel, rank, store=store, observer=diary, timeout_s=30)
        engine = Engine(config, comm)
        right = guess_well(engine, wanted, error) if error is not None else []
        tokens = engine.serve(REQUESTS[rank // tp_size])
        assert engine.cache.num_free_pages == engine.cache.num_pages
        return tokens, diary, right

    for rank, (tokens, diary, right) in enumerate(run_ranks(dp_size * tp_size, tmp_path, run)):
        assert tokens == {r.request_id: wanted[r.request_id] for r in REQUESTS[rank // tp_size]}, f"seed {SEED}"
        for (step, schedule, _), issued in zip(diary.steps, diary.issued, strict=True):
            assert [(e.group, e.op, e.layer) for e in schedule] == issued, f"rank {rank} step {step}"
        assert sum(e.layer.startswith("mtp.layers.0") for e in diary.steps[-1][1]) in (4, 2 * 4, 2 * 2)
        assert error is None or 0 < sum(right) < len(right), "some drafts right, some wrong"


def test_a_rank_that_leaves_the_drafter_out_is_named_and_stops_all(tmp_path):
    class OnlyWhereItHelps(DraftPolicy):
        def num_passes(self, num_drafts, room):
            return min(num_drafts, room or 0)

    config = ServerConfig(MODEL, ParallelConfig(2), DRAFTS, SEED)

    def run(rank, store):
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        with pytest.raises(ScheduleMismatch) as caught:
            Engine(config, comm, Policies(drafts=OnlyWhereItHelps() if rank else DraftPolicy())).serve(REQUESTS[0])
        return str(caught.value)

    first, second = run_ranks(2, tmp_path, run)
    assert first == second and "had not issued ep all_gather_v of mtp.layers.0.moe, which its schedule" in first, first


def test_drafts_need_a_draft_layer_and_room_in_a_step():
    with pytest.raises(ConfigError, match=r"engine.num_drafts: 2 drafts, but the model has no MTP layer"):
        ServerConfig(CONFIG, ParallelConfig(2), DRAFTS, SEED)
    with pytest.raises(ConfigError, match=r"8 is less than max_num_seqs 3 x \(1 \+ num_drafts 2"):
        EngineConfig(max_num_seqs=3, max_num_batched_tokens=8, num_drafts=2)
    with pytest.raises(ConfigError, match="num_drafts: -1 is less than 0"):
        EngineConfig(num_drafts=-1)
