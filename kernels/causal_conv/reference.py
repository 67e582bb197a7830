"""Depthwise causal convolution over time followed by SiLU, in plain torch.

Shapes: B batch, T time, C channels, W filter width, S = W - 1 inputs remembered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None, state_BSC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y[t] = silu(bias + sum_w weight[w] x[t - S + w]), where x before time 0 is the state (None: zeros).

    Returns y [B, T, C] and the state after the last token: the S newest inputs, oldest first.
    """
    (B, T, C), S = x_BTC.shape, weight_CW.shape[1] - 1
    if state_BSC is None:
        state_BSC = x_BTC.new_zeros(B, S, C)
    padded_BLC = torch.cat([state_BSC.to(x_BTC.dtype), x_BTC], dim=1)
    y_BTC = padded_BLC[:, :T] * weight_CW[:, 0]
    for w in range(1, S + 1):
        y_BTC = torch.addcmul(y_BTC, padded_BLC[:, w : w + T], weight_CW[:, w])
    return F.silu(y_BTC if bias_C is None else y_BTC + bias_C), padded_BLC[:, T:]
