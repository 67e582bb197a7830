"""Rotary position embedding in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "missing", "rotate"]


def rotate(*args: Any, **options: Any) -> Any:
    """Rotate the first dimensions of each head by the token's angles, in C++.

    Same arguments and result as `reference.rotate`.
    """
    return native.library().rotate(*args, **options)
