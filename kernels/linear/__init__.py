"""Multiply a few rows by several weights at once: the projections of a decode step.

Shapes: N rows, H inputs, O outputs of a weight.
"""

from collections.abc import Sequence

from hybrid_moe_kernels.checks import FLOATS, Sizes
from hybrid_moe_kernels.registry import Op
from torch import Tensor


def _check(x_NH: Tensor, weights: Sequence[Tensor]) -> None:
    sizes = Sizes(x_NH.device)
    sizes.take("x_NH", x_NH, *FLOATS)
    for weight_OH in weights:
        sizes.known.pop("O", None)
        sizes.take("weight_OH", weight_OH, x_NH.dtype, dense=2)


project = Op(__name__, "project", _check)
