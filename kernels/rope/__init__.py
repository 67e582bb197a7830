"""Rotary position embedding of the first dimensions of each head.

Shapes: T tokens, H heads, D head dim, R half of the rotary dim.
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes
from hybrid_moe_kernels.registry import Op
from torch import Tensor


def _check(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> None:
    sizes = Sizes(x_THD.device)
    sizes.take("x_THD", x_THD, *FLOATS)
    sizes.take("cos_TR", cos_TR, x_THD.dtype)
    sizes.take("sin_TR", sin_TR, x_THD.dtype)
    if 2 * cos_TR.shape[1] > x_THD.shape[2]:
        raise ValueError(f"cos_TR: R is {cos_TR.shape[1]}, but must be at most half of D = {x_THD.shape[2]}")


rotate = Op(__name__, "rotate", _check)
