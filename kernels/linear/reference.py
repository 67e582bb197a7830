"""Projections in plain torch.

Shapes: N rows, H inputs, O outputs of a weight, P blocks of rows into which a weight is cut, R = O / P rows of a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS, MIN_WEIGHT = 16, 1 << 16
"""For at most MAX_ROWS rows and at least MIN_WEIGHT numbers of a weight, a float32 product by blocks of the weight is
faster than one product with the whole weight: 79 us against 143 for one row times 1024 x 256 from memory, on two
threads of an EPYC; 135 against 220 for 8 rows."""


def project(x_NH: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return x weight^T [N, O] for each weight [O, H]. There can be gaps between the rows of a result."""
    return [product(x_NH, weight_OH) for weight_OH in weights]


def product(x_NH: Tensor, weight_OH: Tensor) -> Tensor:
    """Return x weight^T [N, O] for one weight.

    torch computes a product of few rows on one thread of a CPU. So a few float32 rows on a CPU are multiplied by blocks
    of the weight, in one batched product that uses more threads.
    """
    (N, H), O = x_NH.shape, weight_OH.shape[0]
    if N <= MAX_ROWS and O * H >= MIN_WEIGHT and x_NH.dtype == torch.float32 and x_NH.is_cpu:
        P = 1 << (
            torch.get_num_threads().bit_length() - 1
        )  # a power of two, because it divides the sizes of most weights
        if P > 1 and O % P == 0 and N and weight_OH.is_contiguous():
            y_PRN = torch.bmm(weight_OH.view(P, -1, H), x_NH.mT.expand(P, H, N))
            return y_PRN.view(O, N).mT.contiguous()
    return F.linear(x_NH, weight_OH)
