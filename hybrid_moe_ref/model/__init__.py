"""The language model: blocks of a token mixer and an MLP, its random weights, and its MTP layer."""

from hybrid_moe_ref.model.hybrid_moe import HybridMoE, check_device, check_token_ids

__all__ = ["HybridMoE", "check_device", "check_token_ids"]
