"""A decode step of Gated DeltaNet in one Triton launch: all that is between the projections, for one token a sequence.

The step takes the time to read and write the state once: 2 x 4 x H K V bytes a sequence. For 64 heads of 128 x 128 this
is 8.39 MB, or 1.95 us at 4.3 TB/s; the other operands are less than 2 % of that. A Triton program keeps the state of a
whole head in registers (64 KB; 128 threads hold 128 numbers each). Two programs on a multiprocessor then have 128 KB of
loads in flight. From 128 sequences on, this kernel reaches 3.8 TB/s on an H200, where a kernel that only reads and
writes in place reaches 4.0. Four variants were slower: a program for only a part of a head; a program for several heads
that prefetches the next state; more threads; and cache hints.

Shapes: B sequences, H value heads, M key heads, R = H / M value heads of a key head, K key dim, V value dim,
C = 2 M K + H V channels, W filter width, S = W - 1 inputs in a state of the convolution, J slots (each holds the state
of one sequence).
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import arrival_counters, cast, config, convolve, shift, silu, softplus
from torch import Tensor

CONFIGS = [{"num_warps": warps} for warps in (2, 4, 8)]


def decode(
    qkv_BC: Tensor,
    z_BHV: Tensor,
    b_BH: Tensor,
    a_BH: Tensor,
    conv_weight_CW: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    conv_JSC: Tensor,
    state_JHKV: Tensor,
    slots_B: Tensor,
    *,
    num_key_heads: int,
    eps: float,
) -> Tensor:
    """Apply Gated DeltaNet to one new token of each sequence, in Triton.

    Same arguments and result as `reference.decode`, in one launch.

    A sequence with a slot below zero only pads the batch to a fixed size: its output is zeros.
    """
    (B, H, V), M, K = z_BHV.shape, num_key_heads, state_JHKV.shape[2]
    y_BHV = torch.empty(B, H, V, dtype=qkv_BC.dtype, device=qkv_BC.device)
    if y_BHV.numel() == 0:
        return y_BHV
    chosen = config("gated_delta_rule.decode", {"num_warps": 4})
    _decode[(H, B)](
        qkv_BC, z_BHV, b_BH, a_BH, conv_JSC, state_JHKV, slots_B, conv_weight_CW, A_log_H, dt_bias_H, norm_weight_V,
        arrival_counters(qkv_BC.device, B * M), y_BHV,
        qkv_BC.stride(0), z_BHV.stride(0), b_BH.stride(0), a_BH.stride(0), conv_JSC.stride(0), qkv_BC.shape[1],
        state_JHKV.stride(0), eps,
        H=H, R=H // M, K=K, V=V, W=conv_weight_CW.shape[1], BK=triton.next_power_of_2(K),
        BV=triton.next_power_of_2(V), **chosen,
    )  # fmt: skip
    return y_BHV


@triton.jit
def _decode(
    x_ptr, z_ptr, b_ptr, a_ptr, conv_ptr, state_ptr, slot_ptr, weight_ptr, a_log_ptr, dt_bias_ptr, norm_ptr,
    arrived_ptr, y_ptr,
    x_row, z_row, b_row, a_row, conv_slot, conv_row, state_slot, eps,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Process one token of one sequence for one value head."""
    h, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BK), tl.arange(0, BV)
    is_key, is_value = d < K, e < V
    slot = tl.load(slot_ptr + n)
    # Loads that do not need the slot are issued while the slot is loaded.
    z = tl.load(z_ptr + n * z_row + h * V + e, is_value, 0.0).to(tl.float32)
    norm = tl.load(norm_ptr + e, is_value, 0.0).to(tl.float32)
    b, a = tl.load(b_ptr + n * b_row + h).to(tl.float32), tl.load(a_ptr + n * a_row + h).to(tl.float32)
    dt_bias, a_log = tl.load(dt_bias_ptr + h).to(tl.float32), tl.load(a_log_ptr + h).to(tl.float32)
    y_at = y_ptr + (n * H + h) * V + e
    if slot < 0:
        tl.store(y_at, tl.zeros([BV], y_ptr.dtype.element_ty), is_value)
    else:
        state_at = state_ptr + slot * state_slot + h * K * V + (d[:, None] * V + e[None, :])
        is_state = is_key[:, None] & is_value[None, :]
        S = tl.load(state_at, is_state, 0.0).to(tl.float32)

        past_at, x_at = conv_ptr + slot * conv_slot, x_ptr + n * x_row
        q_channel = (h // R) * K + d
        k_channel = (H // R) * K + q_channel
        v_channel = (2 * (H // R)) * K + h * V + e
        q = convolve(x_at, past_at, weight_ptr, None, q_channel, is_key, conv_row, W)
        k = convolve(x_at, past_at, weight_ptr, None, k_channel, is_key, conv_row, W)
        v = convolve(x_at, past_at, weight_ptr, None, v_channel, is_value, conv_row, W)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (K**-0.5)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        qk = tl.sum(q * k, 0)
        beta, decay = 1 / (1 + tl.exp(-b)), tl.exp(-tl.exp(a_log) * softplus(a + dt_bias))
        lacks = beta * (v - decay * tl.sum(k[:, None] * S, 0))
        y = (
            decay * tl.sum(q[:, None] * S, 0) + qk * lacks
        )  # this is the result of a read with q after the write, computed without waiting for the write
        S = decay * S + k[:, None] * lacks[None, :]

        # The R programs of a key head all read its past inputs of q and k. The last program that has read them stores
        # the new ones. What a program read has arrived, because sums over all its threads use it, and no program reads
        # what another one wrote, so the counter need not order other accesses ("relaxed"). A fence would wait while the
        # registers of a state are held: 8 %.
        tl.debug_barrier()
        arrived_at = arrived_ptr + n * (H // R) + h // R
        is_last = tl.atomic_add(arrived_at, 1, sem="relaxed") == R - 1
        tl.store(state_at, S, is_state)
        y *= tl.rsqrt(tl.sum(y * y, 0) / V + eps) * norm
        tl.store(y_at, cast(y * silu(z), y_ptr.dtype.element_ty), is_value)
        shift(x_at, past_at, v_channel, is_value, conv_row, W)
        if is_last:
            shift(x_at, past_at, q_channel, is_key, conv_row, W)
            shift(x_at, past_at, k_channel, is_key, conv_row, W)
            tl.store(arrived_at, 0)
