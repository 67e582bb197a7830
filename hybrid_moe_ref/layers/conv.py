"""The short convolution before a recurrence.

Shapes: T rows of one part of the batch (see `Part`), C channels, W width of the filter.
"""

import torch
from hybrid_moe_kernels import causal_conv
from torch import Tensor, nn

from hybrid_moe_ref.batch import Part
from hybrid_moe_ref.cache.pasts import StatePast


class CausalConv(nn.Module):
    """Depthwise causal convolution and SiLU over the rows of several sequences.

    Each sequence continues from its last `width` - 1 rows, which the cache keeps. Parameters have the same names and
    shapes as those of `nn.Conv1d`.
    """

    def __init__(self, channels: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x_TC: Tensor, past: StatePast, part: Part) -> Tensor:
        """Convolve T rows of C channels, [T, C] to [T, C], and store each sequence's last rows in `past.conv_PWC`.

        past   the cached rows of the sequences, from which the convolution continues
        part   the sequences to which the rows belong
        """
        y_TC: Tensor = causal_conv.prefill(
            x_TC, self.weight[:, 0], self.bias, past.conv_PWC, past.slots_B, part.cu_seqlens_X
        )
        return y_TC
