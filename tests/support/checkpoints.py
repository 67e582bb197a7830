"""Small checkpoints for tests, and edits of their files."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hybrid_moe_ref import HybridMoE, ModelConfig
from hybrid_moe_ref.config import preset

THREE_WAY = ModelConfig.from_mapping(
    preset("tiny").to_mapping()
    | {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64, "mamba_time_step_max": 0.1}
)
QWEN = ModelConfig.from_mapping(THREE_WAY.to_mapping() | {"layer_pattern": "GGGA", "mamba_time_step_max": None})
DENSE = ModelConfig.from_mapping(QWEN.to_mapping() | {"num_experts": 0, "intermediate_size": 48})
TIED = ModelConfig.from_mapping(QWEN.to_mapping() | {"tie_word_embeddings": True})


def build(config: ModelConfig = QWEN, dtype: torch.dtype = torch.float32) -> HybridMoE:
    return HybridMoE(config, device="meta", dtype=dtype).init_weights(seed=2)


def assert_same(a: HybridMoE, b: HybridMoE) -> None:
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
