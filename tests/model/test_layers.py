"""Layers against independent code, and expert shards against the whole."""

import sys

import pytest
import torch
from torch import Tensor

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.attention import GatedAttention
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts, MoE
from hybrid_moe_ref.model.weights import init_weights

CONFIG = ModelConfig(
    layer_pattern="GAM",
    vocab_size=64,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    mamba_num_heads=4,
    mamba_head_dim=16,
    mamba_state_size=16,
    num_experts=24,
    num_experts_per_tok=5,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
)


@pytest.fixture(scope="module")
def hf():
    """transformers' Qwen3.5-MoE modules, and the configuration that equals CONFIG."""
    sys.modules.setdefault("fla", None)  # importable on a machine without a GPU, it makes transformers fail
    modeling = pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    from transformers import Qwen3_5MoeTextConfig

    config = Qwen3_5MoeTextConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=CONFIG.num_attention_heads,
        num_key_value_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        linear_num_key_heads=CONFIG.linear_num_key_heads,
        linear_num_value_heads=CONFIG.linear_num_value_heads,
        linear_key_head_dim=CONFIG.linear_key_head_dim,
        linear_value_head_dim=CONFIG.linear_value_head_dim,
        num_experts=CONFIG.num_experts,
        num_experts_per_tok=CONFIG.num_experts_per_tok,
        moe_intermediate_size=CONFIG.moe_intermediate_size,
        shared_expert_intermediate_size=CONFIG.shared_expert_intermediate_size,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": CONFIG.rope_theta,
            "partial_rotary_factor": CONFIG.partial_rotary_factor,
        },
        attn_implementation="sdpa",
        experts_implementation="eager",
    )
    return modeling, config


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    error = (got - want).norm() / want.norm()
    assert torch.isfinite(error) and error <= tolerance, f"relative error {error:.2e} > {tolerance}"


def seeded(module: torch.nn.Module, prefix: str) -> torch.nn.Module:
    """Our module, with weights as the model would draw them."""
    holder = torch.nn.ModuleDict({prefix: module})
    init_weights(holder, seed=3)
    return module.requires_grad_(False)


def rows(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randn(B, T, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def test_gated_delta_net_equals_transformers(hf) -> None:
    modeling, config = hf
    ours = seeded(GatedDeltaNet(CONFIG), "linear_attn")
    theirs = modeling.Qwen3_5MoeGatedDeltaNet(config, 0)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = rows(2, 70)
    with torch.no_grad():
        close(ours(x.flatten(0, 1), Batch.dense(2, 70)).view_as(x), theirs(x))


def test_attention_equals_transformers(hf) -> None:
    modeling, config = hf
    ours = seeded(GatedAttention(CONFIG), "self_attn")
    theirs = modeling.Qwen3_5MoeAttention(config, 1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = rows(2, 33)
    position_ids = torch.arange(33).expand(2, -1)
    rope = modeling.Qwen3_5MoeTextRotaryEmbedding(config)(x, position_ids)
    with torch.no_grad():
        want, _ = theirs(x, position_embeddings=rope, attention_mask=None)
    close(ours(x.flatten(0, 1), Batch.dense(2, 33)).view_as(x), want)


def test_moe_equals_transformers(hf) -> None:
    modeling, config = hf
    ours = seeded(MoE(CONFIG), "mlp")
    theirs = modeling.Qwen3_5MoeSparseMoeBlock(config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = rows(2, 17)
    with torch.no_grad():
        want = theirs(x)
    close(ours(x.flatten(0, 1)).view_as(x), want)


@pytest.mark.parametrize("num_shards", [2, 4, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_expert_shards_sum_to_the_whole(num_shards: int, num_tokens: int) -> None:
    moe = seeded(MoE(CONFIG).double(), "mlp")
    x = rows(1, num_tokens)[0].double()
    weights, ids = moe.gate(x)
    count = CONFIG.num_experts // num_shards
    shards = [moe.experts.shard(i * count, count) for i in range(num_shards)]
    assert all(shard.gate_up_proj.shape[0] == count for shard in shards)
    parts = [shard(x, weights, ids) for shard in shards]
    torch.testing.assert_close(sum(parts), moe.experts(x, weights, ids), rtol=1e-12, atol=1e-12)


def test_experts_are_their_definition() -> None:
    moe = seeded(MoE(CONFIG).double(), "mlp")
    x = rows(1, 9)[0].double()
    weights, ids = moe.gate(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9, dtype=torch.float64))
    want = torch.zeros_like(x)
    for n in range(9):
        for w, e in zip(weights[n], ids[n], strict=True):
            gate, up = (moe.experts.gate_up_proj[e] @ x[n]).chunk(2)
            want[n] += w * (moe.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(moe.experts(x, weights, ids), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["gate", "experts", "shared_expert", "shared_expert_gate"])
@pytest.mark.parametrize("how", ["after", "before", "replaced"])
def test_whoever_watches_or_replaces_a_part_of_a_mixture_sees_every_call(part: str, how: str) -> None:
    moe, seen = seeded(MoE(CONFIG).double(), "mlp"), []
    x = torch.randn(5, CONFIG.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want, module = moe(x), moe.get_submodule(part)
    if how == "after":
        module.register_forward_hook(lambda *args: seen.append(part))
    elif how == "before":
        module.register_forward_pre_hook(lambda *args: seen.append(part))
    else:
        module.forward = lambda *args, real=module.forward: seen.append(part) or real(*args)
    torch.testing.assert_close(moe(x), want)
    assert seen == [part]


def test_a_row_without_a_local_expert_is_zero() -> None:
    experts = seeded(Experts(8, 4, 6), "experts").shard(4, 2)
    y = experts(torch.ones(3, 4), torch.ones(3, 1), torch.tensor([[0], [4], [7]]))
    assert (y[[0, 2]] == 0).all() and (y[1] != 0).any()


def test_shard_of_a_shard_and_shard_on_meta() -> None:
    whole = seeded(Experts(8, 4, 6), "experts")
    part = whole.shard(2, 4).shard(3, 2)
    assert part.first_expert == 3 and torch.equal(part.down_proj, whole.down_proj[3:5])
    assert Experts(8, 4, 6).to("meta").shard(2, 4).gate_up_proj.is_meta
    with pytest.raises(ValueError, match="experts 6 to 8 are not all among the 8"):
        whole.shard(6, 3)
