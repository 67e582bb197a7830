"""The causal convolution in Triton. A program (an instance of the kernel) computes some channels of some tokens
(`prefill`) or of one token (`update`).

`prefill` reads x once from memory (the W shifted reads of a tile hit the cache), writes y once, and reads and writes
the state once. `update` reads S + 1 numbers and writes S + 1 numbers per channel.

Shapes: T tokens of all sequences, one after another, B sequences, C channels, W filter width, S = W - 1 inputs in a
state, J slots (each holds the state of one sequence), X = B + 1 bounds (sequence b is between bounds b and b + 1).
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import DEVICES, DTYPES, cast, config, convolve, locate, missing, num_tiles, shift, silu
from torch import Tensor

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "missing", "prefill", "update"]

CONFIGS = {
    "causal_conv.prefill": [
        {"BT": BT, "BC": BC, "num_warps": warps} for BT in (8, 16, 32) for BC in (128, 256) for warps in (4, 8)
    ],
    "causal_conv.update": [{"BC": BC, "num_warps": warps} for BC in (128, 256, 512, 1024) for warps in (1, 2, 4)],
}


def prefill(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_JSC: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """Convolve all tokens of several sequences, in Triton. Same arguments and result as `reference.prefill`."""
    (T, C), B, W = x_TC.shape, slots_B.shape[0], weight_CW.shape[1]
    y_TC = torch.empty(T, C, dtype=x_TC.dtype, device=x_TC.device)
    if y_TC.numel() == 0:
        return y_TC
    chosen = config("causal_conv.prefill", {"BT": 16, "BC": 128, "num_warps": 4})
    BT = max(chosen["BT"], triton.next_power_of_2(W))  # only the first tile of a sequence reads the state
    _prefill[(num_tiles(T, B, BT), triton.cdiv(C, chosen["BC"]))](
        x_TC, weight_CW, bias_C, state_JSC, slots_B, cu_seqlens_X, y_TC, x_TC.stride(0), state_JSC.stride(0), B,
        C=C, W=W, **(chosen | {"BT": BT}),
    )  # fmt: skip
    return y_TC


def update(x_BC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_JSC: Tensor, slots_B: Tensor) -> Tensor:
    """Convolve one new token of each sequence, in Triton.

    Same arguments and result as `reference.update`. A sequence with a slot below zero only pads the batch to a fixed
    size: its output is zeros.
    """
    B, C = x_BC.shape
    y_BC = torch.empty(B, C, dtype=x_BC.dtype, device=x_BC.device)
    if y_BC.numel() == 0:
        return y_BC
    chosen = config("causal_conv.update", {"BC": 256, "num_warps": 2})
    _update[(triton.cdiv(C, chosen["BC"]), B)](
        x_BC, weight_CW, bias_C, state_JSC, slots_B, y_BC, x_BC.stride(0), state_JSC.stride(0),
        C=C, W=weight_CW.shape[1], **chosen,
    )  # fmt: skip
    return y_BC


@triton.jit
def _prefill(
    x_ptr, weight_ptr, bias_ptr, state_ptr, slot_ptr, start_ptr, y_ptr, x_row, state_slot, num_sequences,
    C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b, first, length, begin = locate(tl.program_id(0), start_ptr, num_sequences, BT)
    slot = tl.load(slot_ptr + b)
    if (begin < length) & (slot >= 0):
        c = tl.program_id(1) * BC + tl.arange(0, BC)
        is_channel = c < C
        t = begin + tl.arange(0, BT)[:, None]
        is_in = (t < length) & is_channel[None, :]
        x_at = x_ptr + first * x_row
        past_at = state_ptr + slot * state_slot
        y = tl.zeros([BT, BC], tl.float32)
        for w in tl.static_range(W):
            before = t - (W - 1 - w)  # negative times are in the state, whose row 0 is time -(W - 1)
            x = tl.load(x_at + before.to(tl.int64) * x_row + c[None, :], is_in & (before >= 0), 0.0).to(tl.float32)
            past = tl.load(past_at + (before + W - 1) * C + c[None, :], is_in & (before < 0), 0.0).to(tl.float32)
            y += (x + past) * tl.load(weight_ptr + c * W + w, is_channel, 0.0).to(tl.float32)[None, :]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + c, is_channel, 0.0).to(tl.float32)[None, :]
        y_at = y_ptr + (first + t) * C + c[None, :]
        tl.store(y_at, cast(silu(y), y_ptr.dtype.element_ty), is_in)
        if begin == 0:  # the one program that has read these channels of the state also replaces them
            tl.debug_barrier()
            for w in tl.static_range(W - 1):
                newest = length - (W - 1) + w
                if newest >= 0:
                    row = tl.load(x_at + newest.to(tl.int64) * x_row + c, is_channel)
                else:
                    row = tl.load(past_at + (newest + W - 1) * C + c, is_channel)
                tl.store(past_at + w * C + c, row, is_channel)


@triton.jit
def _update(
    x_ptr, weight_ptr, bias_ptr, state_ptr, slot_ptr, y_ptr, x_row, state_slot,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    is_channel = c < C
    slot = tl.load(slot_ptr + b)
    if slot < 0:
        tl.store(y_ptr + b * C + c, tl.zeros([BC], y_ptr.dtype.element_ty), is_channel)
    else:
        x_at, past_at = x_ptr + b * x_row, state_ptr + slot * state_slot
        y = convolve(x_at, past_at, weight_ptr, bias_ptr, c, is_channel, C, W)
        tl.store(y_ptr + b * C + c, cast(y, y_ptr.dtype.element_ty), is_channel)
        tl.debug_barrier()
        shift(x_at, past_at, c, is_channel, C, W)
