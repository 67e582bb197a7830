"""Install the configured kernel backends in the layers of a served model, and list the extensions that they compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from hybrid_moe_kernels import gated_delta_rule, moe, registry
from hybrid_moe_kernels.extension import Extension
from hybrid_moe_kernels.lab import gdn_prefill, moe_experts
from hybrid_moe_kernels.registry import Op

from hybrid_moe_ref.config import ConfigError, EngineConfig
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.model import HybridMoE


def apply_backends(model: HybridMoE, engine: EngineConfig, device: torch.device) -> list[Extension]:
    """Install the configured backends in `model`. Returns the extensions that must be built for these backends.

    Raises ConfigError for a backend that cannot run on this device in the model's dtype.
    """
    extensions: list[Extension] = []
    if engine.gdn_prefill_backend != "auto" and "G" in model.config.layer_pattern:
        if engine.gdn_prefill_backend == "jit":
            rule = gdn_prefill.prefill
            extensions.append(gdn_prefill.extension(device))
        else:
            rule = _function(gated_delta_rule.prefill, engine.gdn_prefill_backend, device, model, "gdn_prefill_backend")
        for layer in model.modules():
            if isinstance(layer, GatedDeltaNet):
                layer.prefill_rule = rule
    if engine.moe_backend != "auto" and model.config.num_experts:
        if engine.moe_backend == "jit":
            if device.type != "cpu":
                raise ConfigError(f"'jit' runs on cpu, not on {device.type}; use 'auto'", "moe_backend")
            mlp = moe_experts.experts
            extensions.append(moe_experts.EXPERTS)
        else:
            mlp = _function(moe.experts, engine.moe_backend, device, model, "moe_backend")
        for layer in model.modules():
            if isinstance(layer, Experts):
                layer.mlp = mlp
    return extensions


@dataclass(frozen=True)
class PreparedKernels:
    """The kernels that one engine has prepared at its start.

    choice         the setting of the kernel registry at the start, such as "auto"
    device, dtype  those in which the engine's model computes
    table          for each operation, the backend that this setting selects

    All engines in a process share the registry. If its setting was changed after the start, `check` raises an error,
    because this engine would run kernels that it did not prepare.
    """

    choice: str
    device: torch.device
    dtype: torch.dtype
    table: dict[str, str]

    @classmethod
    def of_now(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """Return the kernels that the registry's current setting selects."""
        return cls(registry.choice(), device, dtype, registry.table(device.type, dtype))

    def check(self) -> None:
        """Raise ConfigError if the registry now selects a different backend for an operation than at the start."""
        if not self.table.items() <= registry.table(self.device.type, self.dtype).items():
            raise ConfigError(
                f"this engine was started with kernels {self.choice!r}, but the process now uses kernels "
                f"{registry.choice()!r}: call registry.use({self.choice!r}) before serve, or start a new engine",
                "kernels",
            )


def _function(op: Op, backend: str, device: torch.device, model: HybridMoE, field: str) -> Callable[..., Any]:
    implementation = op.implementation(backend, device.type, model.dtype)
    if implementation is None:
        raise ConfigError(f"{backend!r} does not run on {device.type} in {model.dtype} here; use 'auto'", field)
    return implementation.run
