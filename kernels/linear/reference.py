"""Projections in plain torch.

Shapes: N rows, H inputs, O outputs of a weight.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def project(x_NH: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """x weight^T [N, O] for each weight [O, H]. The results' rows are dense, and may lie apart."""
    return [F.linear(x_NH, weight_OH) for weight_OH in weights]
