"""What each tensor-parallel rank holds of the model: parameters, pages of the cache, and what cannot be divided."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from cut_models import CONFIG, SEED, OneOf, build

from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.config import PRESETS, ConfigError
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.sharding.dispatch import chunk_sizes
from hybrid_moe_ref.parallel.sharding.shares import ExpertSharing, Place, local_config, mixer_cuts
from hybrid_moe_ref.parallel.sharding.tensor import apply_tensor_parallel
from hybrid_moe_ref.slices import Slice


@pytest.mark.parametrize(
    ("experts", "key_heads", "value_heads"), [("intermediate", 8, 16), ("expert", 2, 4), ("sequence", 1, 2)]
)
def test_every_rank_draws_exactly_its_slice_and_the_slices_cover_the_model(experts, key_heads, value_heads):
    heads = {"linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads}
    config = dataclasses.replace(CONFIG, mamba_num_groups=2, **heads)
    single = HybridMoE(config, device="meta").init_weights(SEED)
    whole = dict(single.named_parameters())
    unseen = {name: torch.ones(parameter.shape, dtype=torch.bool) for name, parameter in whole.items()}
    for rank in range(4):
        model, _ = build(config, OneOf(rank, 4), experts)
        cut = apply_to_whole(config, OneOf(rank, 4), experts)
        for name, parameter in model.named_parameters():
            piece = model.slices.get(name, Slice(tuple(whole[name].shape)))
            assert torch.equal(parameter, piece.of(whole[name])), f"{name} of rank {rank}"
            assert torch.equal(parameter, cut[name]), f"{name} of rank {rank}"
            place = torch.arange(whole[name].numel()).view(whole[name].shape)
            unseen[name].view(-1)[piece.of(place).flatten()] = False
        assert model.slices.keys() <= whole.keys()
        held_whole = {name for name in whole if name not in model.slices}
        assert held_whole == {name for name in whole if is_whole(name, experts, value_heads < 4)}
    assert not any(mask.any() for mask in unseen.values())


def is_whole(name, experts, splits_heads):
    """Norms over a head or a row, embedding, head, routers and gates; sequence chunks need the shared expert too."""
    if "norm" in name:
        return "mamba.norm" not in name and not (splits_heads and "linear_attn.norm" in name)
    return name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")) or (
        experts == "sequence" and "shared_expert." in name
    )


def apply_to_whole(config, comm, experts):
    """The parameters when a model that has its weights already is cut."""
    model = HybridMoE(config, device="meta").init_weights(SEED)
    apply_tensor_parallel(model, comm, experts)
    return dict(model.named_parameters())


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize(("kv_heads", "groups", "key_heads", "value_heads"), [(1, 1, 1, 2), (2, 2, 4, 4), (8, 8, 8, 8)])
def test_the_cache_of_a_rank_has_the_pages_of_its_heads(tp_size, kv_heads, groups, key_heads, value_heads):
    heads = {"linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads}
    config = dataclasses.replace(CONFIG, num_key_value_heads=kv_heads, mamba_num_groups=groups, **heads)
    assert page_layout(local_config(config, tp_size), 4) == page_layout(config, 4, tp_size=tp_size)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_cut(name, tp_size):
    config = PRESETS[name]
    for experts in typing.get_args(ExpertSharing):
        assert page_layout(local_config(config, tp_size, experts)) == page_layout(config, tp_size=tp_size)


def test_ranks_that_share_a_kv_head_hold_the_one_that_their_query_heads_read():
    for rank in range(8):
        cuts = mixer_cuts(CONFIG, "A", Place(rank, 8))
        assert cuts["q_proj.weight"] == ((0, ((rank * 32, rank * 32 + 32),)),)
        assert cuts["k_proj.weight"] == cuts["v_proj.weight"] == ((0, ((rank // 4 * 16, rank // 4 * 16 + 16),)),)


def test_chunks_are_as_even_as_can_be_and_may_be_empty():
    assert chunk_sizes(10, 4) == (3, 3, 2, 2)
    assert chunk_sizes(1, 4) == (1, 0, 0, 0)
    assert chunk_sizes(7, 1) == (7,)


@pytest.mark.parametrize(
    ("change", "experts", "message"),
    [
        ({"num_attention_heads": 6}, "intermediate", "num_attention_heads: 6 is not divisible by tp_size 4"),
        ({"num_attention_heads": 24, "num_key_value_heads": 3}, "intermediate",
         "num_key_value_heads: 3 is neither divisible by tp_size 4 nor a divisor of it"),
        ({"linear_num_key_heads": 6, "linear_num_value_heads": 12}, "expert",
         "linear_num_key_heads: 6 is neither divisible"),
        ({"linear_num_key_heads": 1, "linear_num_value_heads": 3}, "expert",
         "linear_num_value_heads: 3 is neither divisible"),
        ({"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": 5}, "expert",
         "linear_value_head_dim: 5 is not divisible by 2, the number of ranks that share a value head"),
        ({"mamba_num_heads": 10}, "expert", "mamba_num_heads: 10 is not divisible by tp_size 4"),
        ({"mamba_num_heads": 24, "mamba_num_groups": 6}, "expert", "mamba_num_groups: 6 is neither divisible"),
        ({"moe_intermediate_size": 18}, "intermediate", "moe_intermediate_size: 18 is not divisible by tp_size 4"),
        ({"shared_expert_intermediate_size": 3}, "expert", "shared_expert_intermediate_size: 3 is not divisible"),
        ({"num_experts": 18}, "expert", "num_experts: 18 experts cannot be divided evenly over 4 ranks"),
        ({"num_experts": 0, "intermediate_size": 6}, "intermediate", "intermediate_size: 6 is not divisible"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_with_the_field_and_both_numbers(change, experts, message):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match=message):
        apply_tensor_parallel(HybridMoE(config, device="meta"), OneOf(0, 4), experts)
