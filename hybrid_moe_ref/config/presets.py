"""Named model configurations."""

import dataclasses

from hybrid_moe_ref.config.base import ConfigError, nearest
from hybrid_moe_ref.config.model import ModelConfig


def _qwen(layers: int, hidden: int, heads: int, value_heads: int, experts: int, top_k: int, mlp: int) -> ModelConfig:
    return ModelConfig(
        layer_pattern="GGGA" * (layers // 4),
        vocab_size=248320,
        hidden_size=hidden,
        num_attention_heads=heads,
        linear_num_value_heads=value_heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=mlp,
        shared_expert_intermediate_size=mlp,
        num_mtp_layers=1,
    )


PRESETS: dict[str, ModelConfig] = {
    # For the lab: the real structure, with three mixers and 512 experts, but small enough for eight processes on two
    # cores.
    "tiny": ModelConfig(
        layer_pattern="GGGA MGGA",
        vocab_size=1024,
        hidden_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        mamba_state_size=16,
        mamba_num_groups=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    # For benchmarks against other implementations on a CPU.
    "race": ModelConfig(
        layer_pattern="GGGA GGGA",
        vocab_size=4096,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "qwen3.5-397b-a17b": _qwen(60, 4096, 32, 64, 512, 10, 1024),
    "qwen3.5-122b-a10b": _qwen(48, 3072, 32, 64, 256, 8, 1024),
    "qwen3.5-35b-a3b": _qwen(40, 2048, 16, 32, 256, 8, 512),
    "qwen3-next-80b-a3b": dataclasses.replace(_qwen(48, 2048, 16, 32, 512, 10, 512), vocab_size=151936),
}


def preset(name: str) -> ModelConfig:
    """Return the model configuration of this name. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        hint = nearest(name, PRESETS) or f"; known: {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}{hint}")
    return PRESETS[name]
