"""Attention over a paged KV cache in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "decode", "missing"]


def decode(*args: Any, **options: Any) -> Any:
    """Compute the attention of one new token of each sequence over a paged KV cache, in C++.

    Same arguments and result as `reference.decode`.
    """
    return native.library().attention_decode(*args, **options)
