"""The Mamba-2 recurrence in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "decode", "missing", "prefill"]


def prefill(*args: Any, **options: Any) -> Any:
    """Apply the Mamba-2 recurrence to all tokens of several sequences, in C++.

    Same arguments and result as `reference.prefill`.
    """
    return native.library().scan_prefill(*args, **options)


def decode(*args: Any, **options: Any) -> Any:
    """Apply Mamba-2 to one new token of each sequence, in C++. Same arguments and result as `reference.decode`."""
    return native.library().scan_decode(*args, **options)
