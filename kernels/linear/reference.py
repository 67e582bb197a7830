"""Projections in plain torch.

Shapes: N rows, H inputs, O outputs of a weight, P parts of a weight, R = O / P.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROWS, MIN_WEIGHT = 16, 1 << 16
"""To that many rows, and from that many numbers of a weight, torch's product of float32 is slower than that of parts of
the weight: 143 us and 79 for a row times 1024 x 256 from memory, on two threads of an EPYC; 220 and 135 for 8 rows."""


def project(x_NH: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x weight^T [N, O] for each weight [O, H]. The results' rows are dense, and may lie apart."""
    return [product(x_NH, weight_OH) for weight_OH in weights]


def product(x_NH: Tensor, weight_OH: Tensor) -> Tensor:
    """One of them. On a CPU, torch gives a few rows to one thread; a batch of parts of the weight keeps more busy."""
    (N, H), O = x_NH.shape, weight_OH.shape[0]
    if N <= MAX_ROWS and O * H >= MIN_WEIGHT and x_NH.dtype == torch.float32 and x_NH.is_cpu:
        P = 1 << (torch.get_num_threads().bit_length() - 1)  # a power of two divides most weights
        if P > 1 and O % P == 0 and N and weight_OH.is_contiguous():
            y_PRN = torch.bmm(weight_OH.view(P, -1, H), x_NH.mT.expand(P, H, N))
            return y_PRN.view(O, N).mT.contiguous()
    return F.linear(x_NH, weight_OH)
