"""The causal convolution in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "missing", "prefill", "update"]


def prefill(*args: Any, **options: Any) -> Any:
    """Convolve all tokens of several sequences, in C++. Same arguments and result as `reference.prefill`."""
    return native.library().conv_prefill(*args, **options)


def update(*args: Any, **options: Any) -> Any:
    """Convolve one new token of each sequence, in C++. Same arguments and result as `reference.update`."""
    return native.library().conv_update(*args, **options)
