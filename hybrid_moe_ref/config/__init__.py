"""The configuration of a model, its ranks and its engine: frozen dataclasses that check their own fields.

A `ConfigError` names the path of the field, and the numbers that do not fit together. Nothing here imports torch.
"""

from hybrid_moe_ref.config.base import Config, ConfigError, InputError, nearest
from hybrid_moe_ref.config.engine import (
    DTYPES,
    ENGINE_MODES,
    GDN_PREFILL_BACKENDS,
    MOE_BACKENDS,
    PROTOCOLS,
    EngineConfig,
)
from hybrid_moe_ref.config.model import LAYER_KINDS, ModelConfig
from hybrid_moe_ref.config.parallel import ParallelConfig
from hybrid_moe_ref.config.presets import PRESETS, preset

__all__ = [
    "DTYPES",
    "ENGINE_MODES",
    "GDN_PREFILL_BACKENDS",
    "LAYER_KINDS",
    "MOE_BACKENDS",
    "PRESETS",
    "PROTOCOLS",
    "Config",
    "ConfigError",
    "EngineConfig",
    "InputError",
    "ModelConfig",
    "ParallelConfig",
    "nearest",
    "preset",
]
