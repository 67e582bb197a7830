"""Rotary position embedding in C++."""

from typing import Any

from hybrid_moe_kernels import native
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing

__all__ = ["DEVICES", "DTYPES", "missing", "rotate"]


def rotate(*args: Any, **options: Any) -> Any:
    """As the reference's."""
    return native.library().rotate(*args, **options)
