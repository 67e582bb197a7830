"""Depthwise causal convolution over time followed by SiLU, in plain torch.

Shapes: B sequences, T tokens (in `prefill`, of all sequences, one after another), C channels, W filter width, S = W - 1
inputs in a state, J slots (each holds the state of one sequence), X = B + 1 bounds (sequence b is between bounds
b and b + 1), P = T + B S rows (for each sequence the S inputs of its state, then its tokens), L = S + T rows (the same
of one sequence).
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.sequences import load, store
from torch import Tensor


def prefill(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_JSC: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """Return y [T, C] with y[t] = silu(bias + sum_w weight[w] x[t - S + w]).

    The inputs before the first token of sequence b are state[slots[b]]. Afterwards the state has the S newest inputs of
    the sequence, oldest first. A sequence without tokens keeps its state.
    """
    state_BSC = load(state_JSC, slots_B)
    if slots_B.shape[0] == 1:
        y_1TC, state_BSC = causal_conv(x_TC[None], weight_CW, bias_C, state_BSC)
        store(state_JSC, slots_B, state_BSC)
        return y_1TC[0]
    # One long sequence, in which the remembered inputs of each sequence come before its new ones. The first S outputs
    # of each sequence mix it with the previous one, and are left out.
    (B, S, _), T = state_BSC.shape, x_TC.shape[0]
    ends_B = cu_seqlens_X[1:] + S * torch.arange(1, B + 1, device=x_TC.device)
    lengths_B, remembered_S = cu_seqlens_X.diff(), torch.arange(S, device=x_TC.device)
    numbers_T = torch.arange(B, device=x_TC.device).repeat_interleave(lengths_B, output_size=T)
    places_T = torch.arange(T, device=x_TC.device) + S * (1 + numbers_T)
    places_BS = (ends_B - lengths_B)[:, None] - S + remembered_S
    order = torch.cat([places_BS.flatten(), places_T]).argsort()
    inputs_PC = torch.cat([state_BSC.flatten(0, 1), x_TC]).index_select(0, order)
    y_1PC, _ = causal_conv(inputs_PC[None], weight_CW, bias_C)
    store(state_JSC, slots_B, inputs_PC[(ends_B[:, None] - S + remembered_S).flatten()].view_as(state_BSC))
    return y_1PC[0].index_select(0, places_T)


def update(x_BC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_JSC: Tensor, slots_B: Tensor) -> Tensor:
    """Convolve one new token of each sequence, as `prefill` does for many tokens. Returns y [B, C]."""
    inputs_BWC = torch.cat([load(state_JSC, slots_B), x_BC[:, None]], dim=1)
    store(state_JSC, slots_B, inputs_BWC[:, 1:])
    y_BC = (inputs_BWC * weight_CW.mT).sum(1)
    return F.silu(y_BC if bias_C is None else y_BC + bias_C)


def causal_conv(
    x_BTC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None, state_BSC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve sequences of one length. This function takes and returns the states, instead of using a pool.

    Returns y [B, T, C] and the state [B, S, C] after the last token. If no state is given, it is zeros.
    """
    (B, T, C), S = x_BTC.shape, weight_CW.shape[1] - 1
    if state_BSC is None:
        state_BSC = x_BTC.new_zeros(B, S, C)
    padded_BLC = torch.cat([state_BSC.to(x_BTC.dtype), x_BTC], dim=1)
    y_BTC = padded_BLC[:, :T] * weight_CW[:, 0]
    for w in range(1, S + 1):
        y_BTC = torch.addcmul(y_BTC, padded_BLC[:, w : w + T], weight_CW[:, w])
    return F.silu(y_BTC if bias_C is None else y_BTC + bias_C), padded_BLC[:, T:]
