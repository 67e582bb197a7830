"""What computes the layers of a served model: puts the backends that were chosen in place, and names their modules."""

from __future__ import annotations

import importlib

import torch
from hybrid_moe_kernels.extension import Extension
from hybrid_moe_kernels.gated_delta_rule import jit as gdn_jit
from hybrid_moe_kernels.moe import jit as moe_jit

from hybrid_moe_ref.config import ConfigError, EngineConfig
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.model import HybridMoE


def apply_backends(model: HybridMoE, engine: EngineConfig, device: torch.device) -> list[Extension]:
    """Put the backends in place, all ways of cutting the model alike; the modules that they will use, in order.

    Raises ConfigError for a backend that this device cannot run.
    """
    extensions: list[Extension] = []
    if engine.gdn_prefill_backend != "torch" and "G" in model.config.layer_pattern:
        if engine.gdn_prefill_backend == "jit":
            rule = gdn_jit.chunk_gated_delta_rule
            extensions.append(gdn_jit.extension(device))
        else:
            rule = _triton_rule(device)
        for layer in model.modules():
            if isinstance(layer, GatedDeltaNet):
                layer.prefill_rule = rule
    if engine.moe_backend == "jit" and model.config.num_experts:
        if device.type != "cpu":
            raise ConfigError(f"'jit' is compiled for a CPU, not for {device.type}; use 'torch'", "moe_backend")
        extensions.append(moe_jit.EXPERTS)
        for layer in model.modules():
            if isinstance(layer, Experts):
                layer.mlp = moe_jit.experts_mlp
    return extensions


def _triton_rule(device: torch.device):
    if device.type != "cuda":
        raise ConfigError(f"'triton' needs a GPU, the device is {device.type}; use 'torch'", "gdn_prefill_backend")
    return importlib.import_module("hybrid_moe_kernels.gated_delta_rule.triton").chunk_gated_delta_rule
