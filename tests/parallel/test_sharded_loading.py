"""A rank's part of a checkpoint is what its part of the model would be, and little else is read."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cut_models import CONFIG, SEED, OneOf
from safetensors.torch import load_file, save_file

from hybrid_moe_ref.checkpoint import CheckpointError, load_weights
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.sharding.tensor import apply_tensor_parallel

QWEN = dataclasses.replace(CONFIG, layer_pattern="GGGA")
SHARINGS = ["intermediate", "expert", "sequence"]


def part_of(config, experts, rank=2):
    model = HybridMoE(config, device="meta")
    apply_tensor_parallel(model, OneOf(rank, 4), experts)
    return model


def check_part(folder, config, experts, tolerance=0.0):
    """Load one rank's part from `folder` and compare; returns the model and the opened folder."""
    part, wanted = part_of(config, experts), part_of(config, experts).init_weights(SEED)
    shards = load_weights(part, folder)
    for (name, ours), theirs in zip(part.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=name)
    return part, shards


@pytest.mark.parametrize("experts", SHARINGS)
def test_a_rank_reads_its_rows_and_the_whole_of_what_is_cut_by_columns(tmp_path, experts):
    config = dataclasses.replace(CONFIG, num_mtp_layers=1, mamba_num_groups=2)
    HybridMoE(config, device="meta").init_weights(SEED).save_pretrained(tmp_path)
    part, shards = check_part(tmp_path, config, experts)
    factor = {
        name: 4 if any(dim == parameter.dim() - 1 for dim, _ in part.slices[name].cuts) and parameter.dim() > 1 else 1
        for name, parameter in part.named_parameters()
        if name in part.slices
    }
    assert set(factor.values()) == {1, 4}
    assert shards.bytes_read == sum(p.nbytes * factor.get(name, 1) for name, p in part.named_parameters())


@pytest.mark.parametrize(
    ("experts", "key_heads", "value_heads"), [("intermediate", 8, 16), ("expert", 2, 4), ("sequence", 1, 2)]
)
def test_the_grouped_layout_and_experts_one_by_one(tmp_path, experts, key_heads, value_heads):
    config = dataclasses.replace(QWEN, linear_num_key_heads=key_heads, linear_num_value_heads=value_heads)
    HybridMoE(config, device="meta").init_weights(SEED).save_pretrained(tmp_path, family="qwen3_next")
    check_part(tmp_path, config, experts)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    for name in [name for name in state if name.endswith("experts.gate_up_proj")]:
        prefix = name.removesuffix("gate_up_proj")
        for e, (gate_up, down) in enumerate(zip(state.pop(name), state.pop(prefix + "down_proj"), strict=True)):
            gate, up = gate_up.chunk(2)
            state[f"{prefix}{e}.gate_proj.weight"], state[f"{prefix}{e}.up_proj.weight"] = gate.clone(), up.clone()
            state[f"{prefix}{e}.down_proj.weight"] = down.clone()
    save_file(state, path)
    check_part(tmp_path, config, experts)


def test_float8_blocks_are_dequantised_before_the_cut(tmp_path):
    HybridMoE(QWEN, device="meta").init_weights(SEED).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.o_proj.weight"):
        scale = torch.full([-(-size // 128) for size in state[name].shape], 2.0**-6)
        state[name] = (state[name] * 2.0**6).to(torch.float8_e4m3fn)
        state[name + "_scale_inv"] = scale
    save_file(state, path)
    check_part(tmp_path, QWEN, "intermediate", tolerance=0.05)


def test_a_part_is_not_saved_as_if_it_were_the_model(tmp_path):
    part = part_of(CONFIG, "intermediate").init_weights(SEED)
    with pytest.raises(CheckpointError, match=r"the model holds only a part of \d+ parameters, but only a whole model"):
        part.save_pretrained(tmp_path)


def test_a_checkpoint_of_other_sizes_is_refused_with_the_whole_shapes(tmp_path):
    HybridMoE(QWEN, device="meta").init_weights(SEED).save_pretrained(tmp_path)
    wider = dataclasses.replace(QWEN, moe_intermediate_size=32)
    with pytest.raises(CheckpointError, match=r"gate_up_proj: shape \[16, 32, 48\], wanted \[16, 64, 48\]"):
        load_weights(part_of(wider, "intermediate"), tmp_path)
