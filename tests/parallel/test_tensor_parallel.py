"""A model cut over tensor-parallel ranks computes what one process computes, and communicates as it declares."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cut_models import CONFIG, SEED, build
from ranks import run_ranks

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache
from hybrid_moe_ref.config import PRESETS, ModelConfig, ParallelConfig
from hybrid_moe_ref.generation.speculative import speculative_stream
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import NullObserver
from hybrid_moe_ref.parallel.sharding.tensor import apply_tensor_parallel

# Steps of one dp rank: for each, (sequence, new tokens). Prefill, decode beside prefill, chunks, odd lengths.
RAGGED = [[(0, 5), (1, 1), (2, 9)], [(0, 1), (1, 1), (2, 1)], [(0, 1), (3, 7), (1, 3)], [(3, 1)]]
EVEN = [[(0, 4), (1, 4)], [(0, 1), (1, 1)], [(0, 1), (1, 1)], [(0, 2), (1, 2)]]
SHORT = [[(0, 1)], [(0, 1)], [(0, 2)], []]
IDLE = [[]] * 4


class Listener(NullObserver):
    """Keeps what is issued."""

    def __init__(self):
        self.issued = []

    def enter(self, collective):
        self.issued.append((collective.group, collective.op, collective.layer))


def tokens_of(steps, dp_rank):
    """Token ids for each step, from the seed."""
    draw = random.Random(f"{SEED} {dp_rank}")
    return [torch.tensor([draw.randrange(61) for _ in range(sum(n for _, n in step))]).long() for step in steps]


def run_steps(model, steps, dp_rank, before_step=lambda index: None):
    """Logits of every row of every step, the sequences kept in a cache."""
    cache = HybridCache(model.config, num_pages=40, dtype=model.dtype)
    sequences, logits = {}, []
    for index, (step, tokens_N) in enumerate(zip(steps, tokens_of(steps, dp_rank), strict=True)):
        for name, _ in step:
            sequences.setdefault(name, None)
            sequences[name] = sequences[name] or cache.allocate()
        before_step(index)
        hidden_NH = model.step(tokens_N, Batch.of([(sequences[name], n) for name, n in step]), cache)
        logits.append(model.logits(hidden_NH))
    return logits


def expected_schedule(config, experts):
    """The collectives of one forward pass, by the layout's description."""
    mixers = {"G": "gated_delta_net", "A": "gated_attention", "M": "mamba2"}
    schedule = []
    for index, kind in enumerate(config.layer_pattern):
        layer, mlp = f"layers.{index}", "moe" if config.num_experts else "mlp"
        if experts != "whole":
            schedule.append(("tp", "all_reduce", f"{layer}.{mixers[kind]}"))
        if config.num_experts and experts in ("whole", "sequence"):
            schedule += [("ep", op, f"{layer}.moe") for op in ("all_gather_v", "reduce_scatter_v")]
        if config.num_experts and experts == "sequence":
            schedule.append(("tp", "all_gather_v", f"{layer}.moe"))
        if experts not in ("whole", "sequence") or not config.num_experts:
            schedule.append(("tp", "all_reduce", f"{layer}.{mlp}"))
    return schedule


def run_layout(tmp_path, parallel, config, experts, steps_by_dp, dtype):
    """On every rank of one layout: the logits of each step, and what was issued."""
    declared = expected_schedule(config, experts)

    def run(rank, store):
        listener, dp_rank = Listener(), rank // parallel.tp_size
        comm = Communicator.connect(parallel, rank, store=store, observer=listener, timeout_s=30)
        model, context = build(config, comm, experts, dtype, parallel)
        assert [(e.group, e.op, e.layer) for e in context.schedule] == declared

        def agree(index):
            context.sizes = tuple(sum(n for _, n in steps[index]) for steps in steps_by_dp)
            listener.issued.append("step")

        logits = run_steps(model, steps_by_dp[dp_rank], dp_rank, agree)
        assert listener.issued == ["step", *declared] * len(logits), f"rank {rank}"
        return logits

    return run_ranks(parallel.world_size, tmp_path, run)


def check_layout(tmp_path, parallel, config, experts, steps_by_dp, dtype=torch.float32, limit=1e-5):
    single = HybridMoE(config, device="meta", dtype=dtype).init_weights(SEED)
    wanted = [run_steps(single, steps, dp_rank) for dp_rank, steps in enumerate(steps_by_dp)]
    results = run_layout(tmp_path, parallel, config, experts, steps_by_dp, dtype)
    for rank, logits in enumerate(results):
        first = results[rank - rank % parallel.tp_size]
        assert all(map(torch.equal, logits, first)), "tp ranks decide on tokens alone, so they must agree to the bit"
        for step, (ours, theirs) in enumerate(zip(logits, wanted[rank // parallel.tp_size], strict=True)):
            assert ours.shape == theirs.shape
            worst = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max().item() if len(ours) else 0.0
            assert worst <= limit, f"{parallel}, {experts}, rank {rank}, step {step}, seed {SEED}: {worst:.1e}"


@pytest.mark.parametrize("tp_size", [2, pytest.param(4, marks=pytest.mark.full), 8])
@pytest.mark.parametrize(
    ("experts", "kv_heads", "groups", "key_heads", "value_heads"),
    [("intermediate", 1, 1, 1, 2), ("expert", 2, 2, 2, 8)],
)
def test_tp_equals_the_single_process_in_prefill_and_decode(
    tmp_path, tp_size, experts, kv_heads, groups, key_heads, value_heads
):
    heads = {"linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads}
    config = dataclasses.replace(CONFIG, num_key_value_heads=kv_heads, mamba_num_groups=groups, **heads)
    check_layout(
        tmp_path, ParallelConfig(tp_size=tp_size, expert_parallel=experts == "expert"), config, experts, [RAGGED]
    )


@pytest.mark.parametrize("dp_size", [2, pytest.param(4, marks=pytest.mark.full), 8])
def test_dp_x_ep_equals_the_single_process_in_prefill_and_decode(tmp_path, dp_size):
    steps_by_dp = [RAGGED, SHORT, EVEN, IDLE, RAGGED, EVEN, SHORT, RAGGED][-dp_size:]
    check_layout(tmp_path, ParallelConfig(dp_size), CONFIG, "whole", steps_by_dp)


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "steps_by_dp"),
    [(1, 2, [RAGGED]), (2, 2, [RAGGED, SHORT]), (2, 4, [EVEN, EVEN]), (4, 2, [SHORT, RAGGED, EVEN, RAGGED])],
)
def test_dp_x_tp_x_ep_with_sequence_chunks_equals_the_single_process(tmp_path, dp_size, tp_size, steps_by_dp):
    check_layout(tmp_path, ParallelConfig(dp_size, tp_size), CONFIG, "sequence", steps_by_dp)


def test_a_dense_model_and_one_with_as_many_groups_as_ranks(tmp_path):
    dense = dataclasses.replace(CONFIG, num_experts=0, intermediate_size=20, mamba_num_groups=4)
    check_layout(tmp_path, ParallelConfig(tp_size=4), dense, "intermediate", [RAGGED])


def test_generation_and_drafting_on_tp_ranks_give_the_tokens_of_one_process(tmp_path):
    config = dataclasses.replace(CONFIG, num_mtp_layers=1)
    prompts = [torch.tensor(prompt) for prompt in ([3, 1, 4, 1, 5], [9, 2], [6])]

    def decode(model):
        plain = model.generate(prompts, 6).tolist()
        return plain, list(speculative_stream(model, prompts[0], 6, num_drafts=2))

    def run(rank, store):
        comm = Communicator.connect(ParallelConfig(tp_size=2), rank, store=store, timeout_s=30)
        model = HybridMoE(config, device="meta", dtype=torch.float64)
        apply_tensor_parallel(model, comm)
        assert model.mtp.layers[0].self_attn.q_proj.weight.shape[0] == 4 * 2 * 16
        return decode(model.init_weights(SEED))

    single = decode(HybridMoE(config, device="meta", dtype=torch.float64).init_weights(SEED))
    assert run_ranks(2, tmp_path, run) == [single] * 2


def draw_layout(seed):
    """A layout, a config that divides over it, and steps, from the seed."""
    draw = random.Random(f"layout {seed}")
    dp_size, tp_size = draw.choice([(1, 2), (1, 4), (1, 8), (2, 2), (4, 2), (2, 4)])
    sharing = draw.choice(["intermediate", "expert"]) if dp_size == 1 else "sequence"
    kv_heads, groups, key_heads = draw.choice([1, 2, 8]), draw.choice([1, 2, 8]), draw.choice([1, 2, 4, 8])
    config = ModelConfig(
        layer_pattern="".join(draw.choice("GAM") for _ in range(draw.randint(2, 4))),
        vocab_size=61,
        hidden_size=draw.choice([24, 40, 56]),
        num_attention_heads=8 * draw.randint(1, 3),
        num_key_value_heads=kv_heads,
        head_dim=draw.choice([8, 16, 24]),
        linear_num_key_heads=key_heads,
        linear_num_value_heads=max(key_heads, draw.choice([2, 4, 8, 16, 24])),
        linear_key_head_dim=draw.choice([4, 6]),
        linear_value_head_dim=draw.choice([4, 12]),
        linear_conv_kernel_dim=draw.randint(2, 4),
        mamba_num_heads=8 * draw.randint(1, 2),
        mamba_head_dim=draw.choice([4, 6]),
        mamba_state_size=draw.choice([3, 8]),
        mamba_num_groups=groups,
        mamba_conv_bias=draw.random() < 0.5,
        num_experts=draw.choice([0, 8, 24]),
        num_experts_per_tok=draw.randint(1, 8),
        moe_intermediate_size=8 * draw.randint(1, 3),
        shared_expert_intermediate_size=8 * draw.randint(1, 3),
        intermediate_size=8 * draw.randint(1, 3),
        tie_word_embeddings=draw.random() < 0.5,
    )
    steps = [[(name, draw.randint(1, 70)) for name in range(draw.randint(0, 3))] for _ in range(dp_size)]
    return ParallelConfig(dp_size, tp_size), config, sharing, [[first, [(n, 1) for n, _ in first]] for first in steps]


@pytest.mark.full
@pytest.mark.parametrize("seed", range(24))
def test_drawn_layouts_and_sizes_equal_the_single_process(tmp_path, seed):
    """In float64, where an expert choice is not a matter of the last bit and every difference is a fault."""
    check_layout(tmp_path, *draw_layout(seed), dtype=torch.float64, limit=1e-11)


@pytest.mark.full
def test_the_smallest_preset_on_eight_ranks_that_split_its_value_heads(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], layer_pattern="GMA", vocab_size=61, num_experts=16)
    check_layout(tmp_path, ParallelConfig(tp_size=8), config, "intermediate", [RAGGED])
