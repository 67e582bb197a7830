"""The server in every layout serves the tokens of one process, and stops as a whole."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cut_models import CONFIG, SEED
from diary import Diary
from ranks import run_ranks

from hybrid_moe_ref.config import ConfigError, EngineConfig, ParallelConfig, preset
from hybrid_moe_ref.engine.lifecycle import Engine, PrepareFailed
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Request
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch
from repro.lab.workload import WorkloadConfig, draw_requests

ENGINE = EngineConfig(max_num_seqs=3, max_num_batched_tokens=20, num_pages=40, unfinished_interval=8, dtype="float64")
REQUESTS = draw_requests(WorkloadConfig(max_arrival_step=4), 2, CONFIG.vocab_size, SEED)


def server(dp_size, tp_size, expert_parallel=True, model=CONFIG, checks="agree"):
    return ServerConfig(model, ParallelConfig(dp_size, tp_size, expert_parallel), ENGINE, SEED, checks)


def single_process_tokens(requests_by_dp):
    model = HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(SEED)
    return [
        {r.request_id: model.generate(torch.tensor([r.prompt]), r.max_new_tokens)[0].tolist() for r in requests}
        for requests in requests_by_dp
    ]


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "expert_parallel", "checks"),
    [
        (2, 2, True, "agree"),
        (2, 2, False, "strict"),
        (1, 4, True, "agree"),
        (1, 4, False, "agree"),
        (2, 1, False, "observe"),
    ],
)
def test_the_server_gives_the_tokens_of_one_process_and_issues_what_it_planned(
    tmp_path, dp_size, tp_size, expert_parallel, checks
):
    config, requests = server(dp_size, tp_size, expert_parallel, checks=checks), REQUESTS[-dp_size:]

    def run(rank, store):
        diary = Diary()
        comm = Communicator.connect(config.parallel, rank, store=store, observer=diary, timeout_s=30)
        return Engine(config, comm).serve(requests[rank // tp_size]), diary

    wanted = single_process_tokens(requests)
    for rank, (tokens, diary) in enumerate(run_ranks(dp_size * tp_size, tmp_path, run)):
        assert tokens == wanted[rank // tp_size], f"rank {rank}, seed {SEED}"
        for (step, schedule, _), issued in zip(diary.steps, diary.issued, strict=True):
            assert [(e.group, e.op, e.layer) for e in schedule] == issued, f"rank {rank} step {step}"


P = (5, 9, 2)
OTHER_REQUESTS = {
    "longer": ([Request("a", (*P, 3, 3), 2)], "rank {odd} has 5 tokens of a, {rest} 3 tokens of a"),
    "other tokens": (
        [Request("a", (5, 7, 2), 2)],
        "rank {odd} has token 7 at position 1 of a, {rest} token 9 at position 1 of a",
    ),
    "another id": ([Request("b", P, 2)], "rank {odd} has 3 tokens of b, {rest} 3 tokens of a"),
    "none": ([], "rank {odd} has 1 token of dummy, {rest} 3 tokens of a"),
}


@pytest.mark.parametrize("checks", ["agree", pytest.param("strict", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "other",
    [pytest.param(name, marks=[pytest.mark.full] * (name in ("another id", "none"))) for name in OTHER_REQUESTS],
)
@pytest.mark.parametrize(("dp_size", "tp_size"), [(2, 2), pytest.param(1, 8, marks=pytest.mark.full)])
def test_a_tp_rank_that_is_given_other_requests_stops_all_ranks_before_the_first_layer(
    tmp_path, dp_size, tp_size, other, checks
):
    config, odd = server(dp_size, tp_size, checks=checks), dp_size * tp_size - 1
    requests, words = OTHER_REQUESTS[other]

    def run(rank, store):
        diary = Diary()
        comm = Communicator.connect(config.parallel, rank, store=store, observer=diary, timeout_s=30)
        engine = Engine(config, comm)
        with pytest.raises(ScheduleMismatch) as stopped:
            engine.serve(requests if rank == odd else [Request("a", P, 2)])
        return str(stopped.value), [layer for _, _, layer in diary.issued[-1] if layer.startswith("layers")]

    group = range(odd + 1 - tp_size, odd + 1)
    rest = f"ranks {','.join(map(str, group[:-1]))} have" if tp_size > 2 else f"rank {group[0]} has"
    message = (
        "step 1: the ranks of a tp group do not run the same tokens: "
        f"tp group {','.join(map(str, group))}: {words.format(odd=odd, rest=rest)}"
    )
    assert run_ranks(odd + 1, tmp_path, run) == [(message, [])] * (odd + 1)


@pytest.mark.full
def test_a_difference_that_one_dp_group_sees_stops_the_ranks_of_all(tmp_path):
    config = server(2, 2)

    def run(rank, store):
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        engine = Engine(config, comm)
        if rank == 3:
            known = engine.runner.schedules
            engine.runner.schedules = dataclasses.replace(known, forward=known.forward[:-2])
        with pytest.raises(ScheduleMismatch) as caught:
            engine.serve([])
        return str(caught.value)

    messages = run_ranks(4, tmp_path, run)
    assert len(set(messages)) == 1 and messages[0].startswith("step 1: the schedules differ at entry "), messages


def test_a_tp_rank_that_cannot_prepare_stops_the_ranks_of_all_groups(tmp_path):
    config = server(2, 2)

    def run(rank, store):
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        if rank == 1:

            def warm_up(self):
                raise OSError("no compiler found")

            ModelRunner.warm_up = warm_up
        with pytest.raises(PrepareFailed) as caught:
            Engine(config, comm)
        return str(caught.value)

    assert run_ranks(4, tmp_path, run) == ["rank 1 could not prepare: OSError: no compiler found"] * 4


def test_a_layout_that_does_not_divide_is_refused_when_the_server_is_configured():
    with pytest.raises(ConfigError, match="num_attention_heads: 8 is not divisible by tp_size 16"):
        server(1, 16, model=preset("tiny"))
    for tp_size in (2, 4, 8):
        server(1, tp_size, expert_parallel=False, model=preset("tiny"))
    with pytest.raises(ConfigError, match=r"ep_size: 16 experts do not divide over 6 ranks \(dp_size 3 x tp_size 2\)"):
        server(3, 2)
    server(3, 2, expert_parallel=False)
    with pytest.raises(ConfigError, match="moe_intermediate_size: 10 is not divisible by tp_size 4"):
        server(1, 4, expert_parallel=False, model=dataclasses.replace(CONFIG, moe_intermediate_size=10))
    server(1, 4, model=dataclasses.replace(CONFIG, moe_intermediate_size=10))
