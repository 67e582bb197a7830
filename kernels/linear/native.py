"""Projections in C++, for as many rows as leave them bound by memory; more are the library's business.

Shapes: N rows, H inputs, O outputs of a weight.
"""

from collections.abc import Sequence

from hybrid_moe_kernels import native
from hybrid_moe_kernels.linear import reference
from hybrid_moe_kernels.native import CHECKS, DEVICES, DTYPES, missing
from torch import Tensor

__all__ = ["CHECKS", "DEVICES", "DTYPES", "MAX_ROWS", "missing", "project"]

MAX_ROWS = 8


def project(x_NH: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """As the reference's."""
    if x_NH.shape[0] > MAX_ROWS:
        return reference.project(x_NH, weights)
    return native.library().project(x_NH, weights)
