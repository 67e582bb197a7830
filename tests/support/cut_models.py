"""A model whose sizes are divisible by up to eight tensor-parallel ranks, cut to the part of one rank."""

from __future__ import annotations

import torch

from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.sharding.layout import apply_layout
from hybrid_moe_ref.parallel.sharding.shares import expert_sharing
from hybrid_moe_ref.parallel.sharding.tensor import apply_tensor_parallel

CONFIG = ModelConfig(
    layer_pattern="GMA",
    vocab_size=61,
    hidden_size=48,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    mamba_num_heads=16,
    mamba_head_dim=8,
    mamba_state_size=4,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)
SEED = 5


class OneOf:
    """A substitute for the communicator of one rank of a single tp group."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def members(self, group):
        return tuple(range(self.size))

    def group_rank(self, group):
        return self.rank


def build(config, comm, experts, dtype=torch.float32, parallel=None):
    """Cut the model to one rank's part. Returns the model and its context."""
    model = HybridMoE(config, device="meta", dtype=dtype)
    if parallel and experts == (expert_sharing(parallel) if parallel.tp_size > 1 else "whole"):
        context = apply_layout(model, comm, parallel)
    else:
        context = apply_tensor_parallel(model, comm, experts)
    assert all(parameter.is_meta for parameter in model.parameters()), "nothing is allocated before it is cut"
    return model.init_weights(SEED), context
