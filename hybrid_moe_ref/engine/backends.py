"""What computes the layers of a served model: puts the backends that were chosen in place, and names their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hybrid_moe_kernels import gated_delta_rule, moe
from hybrid_moe_kernels.extension import Extension
from hybrid_moe_kernels.gated_delta_rule import jit as gdn_jit
from hybrid_moe_kernels.moe import jit as moe_jit
from hybrid_moe_kernels.registry import Op

from hybrid_moe_ref.config import ConfigError, EngineConfig
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.model import HybridMoE


def apply_backends(model: HybridMoE, engine: EngineConfig, device: torch.device) -> list[Extension]:
    """Put the backends in place, however the model was cut; the modules that they will use, in order.

    Raises ConfigError for a backend that this device cannot run.
    """
    extensions: list[Extension] = []
    if engine.gdn_prefill_backend != "auto" and "G" in model.config.layer_pattern:
        rule = _function(gated_delta_rule.prefill, engine.gdn_prefill_backend, device, model, "gdn_prefill_backend")
        if engine.gdn_prefill_backend == "jit":
            extensions.append(gdn_jit.extension(device))
        for layer in model.modules():
            if isinstance(layer, GatedDeltaNet):
                layer.prefill_rule = rule
    if engine.moe_backend != "auto" and model.config.num_experts:
        if engine.moe_backend == "jit":
            extensions.append(moe_jit.EXPERTS)
        mlp = _function(moe.experts, engine.moe_backend, device, model, "moe_backend")
        for layer in model.modules():
            if isinstance(layer, Experts):
                layer.mlp = mlp
    return extensions


def _function(op: Op, backend: str, device: torch.device, model: HybridMoE, field: str) -> Callable[..., Any]:
    found = op.implementation(backend, device.type, model.dtype)
    if found is None:
        raise ConfigError(f"{backend!r} does not run on {device.type} in {model.dtype} here; use 'auto'", field)
    return found.run
