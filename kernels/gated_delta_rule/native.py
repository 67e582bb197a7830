"""The gated delta rule in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "decode", "missing", "prefill"]


def prefill(*args: Any, **options: Any) -> Any:
    """Apply the gated delta rule to all tokens of several sequences, in C++.

    Same arguments and result as `reference.prefill`.
    """
    return native.library().rule_prefill(*args, **options)


def decode(*args: Any, **options: Any) -> Any:
    """Apply Gated DeltaNet to one new token of each sequence, in C++.

    Same arguments and result as `reference.decode`.
    """
    return native.library().rule_decode(*args, **options)
