"""Mixture of experts in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "experts", "missing", "mixture"]


def experts(*args: Any, **options: Any) -> Any:
    """Sum the outputs of the chosen experts of each row, in C++. Same arguments and result as `reference.experts`."""
    return native.library().experts(*args, **options)


def mixture(*args: Any, **options: Any) -> Any:
    """Apply a whole MoE layer, with router and shared expert, in C++.

    Same arguments and result as `reference.mixture`.
    """
    return native.library().mixture(*args, **options)
