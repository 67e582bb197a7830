"""The Mamba-2 recurrence in Triton. `prefill` and `decode` are one launch each, for sequences of any lengths.

In `prefill`, a Triton program processes the chunks of one sequence and head in order, with the state in registers. For
each token and head of 64 x 128 in bfloat16, it reads x (128 B), b and c (512 B, mostly from L2, because the heads of a
group share them) and dt, and writes y (128 B). The state is read and written once per prompt.

`decode` takes the time to read and write the state once: 2 x 4 x H P N bytes a sequence. For 128 heads of 64 x 128 this
is 8.39 MB, or 1.95 us at 4.3 TB/s. An H200 reaches 3.6 TB/s at 64 sequences and 3.9 at 256, where a kernel that only
reads and writes in place reaches 4.0.

Shapes: T tokens of all sequences, one after another, B sequences, H heads, P head dim, G groups of heads that share b
and c, R = H / G heads of a group, N state size, I = H P dims of all heads, C tokens of a chunk (in `decode`, the
I + 2 G N channels), W filter width, S = W - 1 inputs in a state of the convolution, J slots (each holds the state of
one sequence), X = B + 1 bounds (sequence b is between bounds b and b + 1).
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import (
    DEVICES,
    DTYPES,
    arrival_counters,
    cast,
    config,
    convolve,
    missing,
    product,
    shift,
    silu,
    softplus,
)
from torch import Tensor

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "decode", "missing", "prefill"]

CONFIGS = {
    "ssd.prefill": [
        {"BP": BP, "num_warps": warps, "num_stages": stages}
        for BP, warps in ((16, 2), (16, 4), (32, 4))
        for stages in (1, 2, 3)
    ],
    "ssd.decode": [{"num_warps": warps} for warps in (1, 2, 4)],
}


def prefill(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    D_H: Tensor,
    state_JHPN: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """Apply the Mamba-2 recurrence to all tokens of several sequences, in Triton.

    Same arguments and result as `reference.prefill`. The state is float32. In products with bfloat16, 16 bits of each
    number of the state are kept.
    """
    (_, H, P), (_, G, N), B = x_THP.shape, b_TGN.shape, slots_B.shape[0]
    y_THP = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
    if y_THP.numel() == 0:
        return y_THP
    if x_THP.dtype == torch.float32:
        shared, with_state, C, tiling = "tf32x3", "tf32x3", 16, {"BP": 16, "num_warps": 4, "num_stages": 1}
    else:
        shared, with_state, C, tiling = "bf16", "bf16x2", 32, {"BP": 32, "num_warps": 4, "num_stages": 2}
    chosen = config("ssd.prefill", tiling)
    _scan_chunks[(B * H * triton.cdiv(P, chosen["BP"]),)](
        x_THP, dt_TH, A_H, b_TGN, c_TGN, D_H, state_JHPN, slots_B, cu_seqlens_X, y_THP,
        x_THP.stride(0), x_THP.stride(1), dt_TH.stride(0), b_TGN.stride(0), b_TGN.stride(1), c_TGN.stride(0),
        c_TGN.stride(1), state_JHPN.stride(0),
        H=H, R=H // G, P=P, N=N, BN=max(16, triton.next_power_of_2(N)), C=C, SHARED=shared, STATE=with_state, **chosen,
    )  # fmt: skip
    return y_THP


def decode(
    xbc_BC: Tensor,
    z_BI: Tensor,
    dt_BH: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor | None,
    conv_JSC: Tensor,
    state_JHPN: Tensor,
    slots_B: Tensor,
    *,
    num_groups: int,
    dt_limit: tuple[float, float | None],
    eps: float,
) -> Tensor:
    """Apply Mamba-2 to one new token of each sequence, in Triton.

    Same arguments and result as `reference.decode`, in one launch.

    A sequence with a slot below zero only pads the batch to a fixed size: its output is zeros.
    """
    (B, I), (H, P, N), G = z_BI.shape, state_JHPN.shape[1:], num_groups
    y_BI = torch.empty(B, I, dtype=xbc_BC.dtype, device=xbc_BC.device)
    if y_BI.numel() == 0:
        return y_BI
    gated_BI = None if norm_weight_I is None else torch.empty(B, I, dtype=torch.float32, device=xbc_BC.device)
    low, high = dt_limit
    BP, BN, GROUP = triton.next_power_of_2(P), triton.next_power_of_2(N), triton.next_power_of_2(H // G * P)
    chosen = config("ssd.decode", {"num_warps": 2 if BP * BN <= 8192 else 4})
    _decode[(H, B)](
        xbc_BC, z_BI, dt_BH, conv_JSC, state_JHPN, slots_B, conv_weight_CW, conv_bias_C, A_log_H, D_H, dt_bias_H,
        norm_weight_I, arrival_counters(xbc_BC.device, B * G), gated_BI, y_BI,
        xbc_BC.stride(0), z_BI.stride(0), dt_BH.stride(0), conv_JSC.stride(0), xbc_BC.shape[1], state_JHPN.stride(0),
        float(low), float("inf") if high is None else float(high), eps,
        H=H, R=H // G, P=P, N=N, W=conv_weight_CW.shape[1], BP=BP, BN=BN, GROUP=GROUP, **chosen,
    )  # fmt: skip
    return y_BI


@triton.jit
def _scan_chunks(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, state_ptr, slot_ptr, start_ptr, y_ptr,
    x_row, x_head, dt_row, b_row, b_group, c_row, c_group, state_slot,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    C: tl.constexpr, SHARED: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Process the chunks of one sequence and head in order, for some of the head's dimensions."""
    parts: tl.constexpr = (
        P + BP - 1
    ) // BP  # programs of one head are neighbours, so that they find b and c in the cache
    part, head = tl.program_id(0) % parts, tl.program_id(0) // parts
    s, h = head // H, head % H
    t, n, p = tl.arange(0, C), tl.arange(0, BN), part * BP + tl.arange(0, BP)
    first = tl.load(start_ptr + s)
    length = (tl.load(start_ptr + s + 1) - first).to(tl.int32)
    slot = tl.load(slot_ptr + s)
    if (length > 0) & (slot >= 0):
        state_at = state_ptr + slot * state_slot + h * P * N + (p[:, None] * N + n[None, :])
        is_state = (p < P)[:, None] & (n < N)[None, :]
        S = tl.load(state_at, is_state, 0.0).to(tl.float32)
        a = tl.load(a_ptr + h).to(tl.float32)
        skip = tl.load(d_ptr + h).to(tl.float32)
        for begin in range(0, length, C):
            is_row = t < length - begin
            row = first + begin  # a scalar of 64 bits; distances within a tile fit into 32 bits
            is_x, is_bc = is_row[:, None] & (p < P)[None, :], is_row[:, None] & (n < N)[None, :]
            x = tl.load(x_ptr + row * x_row + h * x_head + (t[:, None] * x_row + p[None, :]), is_x, 0.0)
            b = tl.load(b_ptr + row * b_row + (h // R) * b_group + (t[:, None] * b_row + n[None, :]), is_bc, 0.0)
            c = tl.load(c_ptr + row * c_row + (h // R) * c_group + (t[:, None] * c_row + n[None, :]), is_bc, 0.0)
            dt = tl.load(dt_ptr + row * dt_row + h + t * dt_row, is_row, 0.0).to(tl.float32)

            # The sum between two tokens is computed term by term: a difference of two long sums would lose its last
            # bits.
            gap = tl.cumsum(tl.where(t[:, None] > t[None, :], (dt * a)[:, None], 0.0), 0)
            since, after = tl.cumsum(dt * a, 0), tl.sum(tl.where(t[:, None] == C - 1, gap, 0.0), 0)
            decay = tl.exp(tl.where(t[:, None] >= t[None, :], gap, float("-inf"))) * dt[None, :]
            y = product(product(c, tl.trans(b), SHARED) * decay, x, STATE)
            y += tl.exp(since)[:, None] * product(c, tl.trans(S), STATE) + skip * x.to(tl.float32)
            y_at = y_ptr + (row * H + h) * P + (t[:, None] * (H * P) + p[None, :])
            tl.store(y_at, cast(y, y_ptr.dtype.element_ty), is_x)
            kept = x.to(tl.float32) * (dt * tl.exp(after))[:, None]
            S = S * tl.exp(tl.sum(dt * a, 0)) + product(tl.trans(kept), b, STATE)
        tl.store(state_at, S, is_state)


@triton.jit
def _decode(
    x_ptr, z_ptr, dt_ptr, conv_ptr, state_ptr, slot_ptr, weight_ptr, bias_ptr, a_log_ptr, d_ptr, dt_bias_ptr, norm_ptr,
    arrived_ptr, gated_ptr, y_ptr,
    x_row, z_row, dt_row, conv_slot, conv_row, state_slot, dt_low, dt_high, eps,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr, N: tl.constexpr, W: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Process one token of one sequence for one head.

    In each group of heads, the Triton program that ends last also updates the past inputs of b and c, and applies the
    norm to the group.
    """
    h, s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    is_p, is_n = p < P, n < N
    slot = tl.load(slot_ptr + s)
    # Loads that do not need the slot are issued while the slot is loaded.
    dt = tl.load(dt_ptr + s * dt_row + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
    a_log, skip = tl.load(a_log_ptr + h).to(tl.float32), tl.load(d_ptr + h).to(tl.float32)
    if norm_ptr is not None:
        z = tl.load(z_ptr + s * z_row + h * P + p, is_p, 0.0).to(tl.float32)
    y_at = y_ptr + s * (H * P)
    if slot < 0:
        tl.store(y_at + h * P + p, tl.zeros([BP], y_ptr.dtype.element_ty), is_p)
    else:
        state_at = state_ptr + slot * state_slot + h * P * N + (p[:, None] * N + n[None, :])
        is_state = is_p[:, None] & is_n[None, :]
        S = tl.load(state_at, is_state, 0.0).to(tl.float32)

        past_at, x_at = conv_ptr + slot * conv_slot, x_ptr + s * x_row
        x_channel, b_channel = h * P + p, H * P + (h // R) * N + n
        c_channel = b_channel + (H // R) * N
        x = convolve(x_at, past_at, weight_ptr, bias_ptr, x_channel, is_p, conv_row, W)
        b = convolve(x_at, past_at, weight_ptr, bias_ptr, b_channel, is_n, conv_row, W)
        c = convolve(x_at, past_at, weight_ptr, bias_ptr, c_channel, is_n, conv_row, W)
        tl.debug_barrier()
        shift(x_at, past_at, x_channel, is_p, conv_row, W)
        dt = tl.minimum(tl.maximum(softplus(dt), dt_low), dt_high)
        S *= tl.exp(-tl.exp(a_log) * dt)
        S += (dt * x)[:, None] * b[None, :]
        y = tl.sum(S * c[None, :], 1) + skip * x
        if norm_ptr is None:
            tl.store(y_at + h * P + p, cast(y, y_ptr.dtype.element_ty), is_p)
        else:
            tl.store(gated_ptr + s * (H * P) + h * P + p, y * silu(z), is_p)

        # Incrementing the counter waits for the stores before it, so the state is stored after it.
        tl.debug_barrier()
        arrived_at = arrived_ptr + s * (H // R) + h // R
        arrived = tl.atomic_add(arrived_at, 1, sem="release")
        tl.store(state_at, S, is_state)
        if arrived == R - 1:
            tl.atomic_add(arrived_at, 0, sem="acquire")
            tl.debug_barrier()
            shift(x_at, past_at, b_channel, is_n, conv_row, W)
            shift(x_at, past_at, c_channel, is_n, conv_row, W)
            if norm_ptr is not None:
                i = tl.arange(0, GROUP)
                feature = (h // R) * (R * P) + i
                is_in = i < R * P
                # Read around the first-level cache, which is private to this multiprocessor.
                gated = tl.load(gated_ptr + s * (H * P) + feature, is_in, 0.0, cache_modifier=".cg")
                gated *= tl.rsqrt(tl.sum(gated * gated, 0) / (R * P) + eps)
                gated *= tl.load(norm_ptr + feature, is_in, 0.0).to(tl.float32)
                tl.store(y_at + feature, cast(gated, y_ptr.dtype.element_ty), is_in)
            tl.store(arrived_at, 0)
