"""Projections in C++, for a few rows.

For more rows, torch's product is as fast as this one. The exception is bfloat16 on a processor without bfloat16
instructions: there torch's product is eight times slower.

Shapes: N rows, H inputs, O outputs of a weight.
"""

from collections.abc import Sequence

import torch
from hybrid_moe_kernels import native
from hybrid_moe_kernels.linear import reference
from hybrid_moe_kernels.native import DEVICES, DTYPES, missing
from torch import Tensor

__all__ = ["DEVICES", "DTYPES", "MAX_ROWS", "missing", "project"]

MAX_ROWS = {torch.float32: 8, torch.bfloat16: 8 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 1 << 62}
"""Largest number of rows that this module multiplies itself; torch multiplies more rows."""


def project(x_NH: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Multiply a few rows by several weights, in C++. Same arguments and result as `reference.project`."""
    if x_NH.shape[0] > MAX_ROWS[x_NH.dtype]:
        return reference.project(x_NH, weights)
    return native.library().project(x_NH, weights)
