"""A readable reference of hybrid MoE language models: gated attention, Gated DeltaNet, Mamba-2, experts.

`from hybrid_moe_ref import HybridMoE, ModelConfig`. Each name is imported when it is first used. So importing the
package, its configuration (`config`) or the computation of page sizes (`cache.pages`) does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid_moe_ref.batch import Batch
    from hybrid_moe_ref.cache.hybrid_cache import CacheExhausted, HybridCache
    from hybrid_moe_ref.config import ConfigError, ModelConfig, preset
    from hybrid_moe_ref.model import HybridMoE

_HOME = {
    "Batch": "batch",
    "CacheExhausted": "cache.hybrid_cache",
    "ConfigError": "config",
    "HybridCache": "cache.hybrid_cache",
    "HybridMoE": "model",
    "ModelConfig": "config",
    "preset": "config",
}
__all__ = ["Batch", "CacheExhausted", "ConfigError", "HybridCache", "HybridMoE", "ModelConfig", "preset"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
