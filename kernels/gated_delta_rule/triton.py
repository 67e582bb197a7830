"""The gated delta rule for GPUs: ragged prompts in chunks, and a whole decode step in one launch.

Prefill takes two launches. The first, over all chunks at once, makes what does not depend on the state; the second
walks through each sequence with the state in registers. Per token and value head of 128 x 128 in bfloat16, the second
reads v (256 B), q and k (512 B, mostly from L2: value heads share them) and two rows of the first's tiles (512 B), and
writes o (256 B); q, k and tiles once for each of the V / BV programs of a head. The state moves once per prompt.

Decode is bound by its state, read and written once: 2 x 4 x H K V bytes a sequence, 8.39 MB for 64 heads of 128 x 128,
which at 4.3 TB/s is 1.95 us; its other operands are less than 2 % of that. A program has a whole head in registers
(64 KB; 256 threads hold 64 numbers each), so that two on a multiprocessor keep 128 KB of loads in flight.

Shapes: T tokens of all sequences, one after another, B sequences, H value heads, M key heads, R = H / M, K key dim, V
value dim, C tokens of a chunk (in `decode` the channels 2 M K + H V), W filter width, S = W - 1, J slots, X = B + 1.
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
    locate,
    missing,
    num_tiles,
    product,
    shift,
    silu,
    softplus,
)
from torch import Tensor

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "decode", "missing", "prefill"]

CONFIGS = {
    "gated_delta_rule.prefill": [
        {"BV": BV, "num_warps": warps, "num_stages": stages}
        for BV in (32, 64)
        for warps in (4, 8)
        for stages in (1, 2, 3)
    ],
    "gated_delta_rule.decode": [{"BV": BV, "num_warps": warps} for BV in (16, 32, 64, 128) for warps in (2, 4, 8, 16)],
}


def prefill(
    q_TMK: Tensor,
    k_TMK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    state_JHKV: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """As the reference. The state is float32; for bfloat16 inputs, products see 16 bits of it, and 11 of what is made
    within a chunk: with the 8 that would be natural there, errors are a third larger than the reference's."""
    (T, M, K), (_, H, V), B = q_TMK.shape, v_THV.shape, slots_B.shape[0]
    o_THV = torch.empty(v_THV.shape, dtype=v_THV.dtype, device=v_THV.device)
    if o_THV.numel() == 0:
        return o_THV
    is_wide = q_TMK.dtype == torch.float32
    keys, with_state, chunk = ("tf32x3", "tf32x3", "tf32x3") if is_wide else ("bf16", "bf16x2", "tf32")
    C = 32 if is_wide else 64
    BK = max(16, triton.next_power_of_2(K))
    tiles = num_tiles(T, B, C)
    solve = torch.empty(tiles, H, C, C, dtype=torch.float32, device=q_TMK.device)
    reads = torch.empty_like(solve)
    scales = torch.empty(tiles, H, 4, C, dtype=torch.float32, device=q_TMK.device)
    strides = (q_TMK.stride(0), q_TMK.stride(1), k_TMK.stride(0), k_TMK.stride(1))
    _solve_chunks[(tiles, H)](
        q_TMK, k_TMK, g_TH, beta_TH, cu_seqlens_X, solve, reads, scales,
        *strides, g_TH.stride(0), beta_TH.stride(0), B,
        H=H, R=H // M, K=K, BK=BK, C=C, LOG_C=C.bit_length() - 1, KEYS=keys, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    chosen = config(
        "gated_delta_rule.prefill", {"BV": min(C, max(16, triton.next_power_of_2(V))), "num_warps": 8, "num_stages": 2}
    )
    _scan_chunks[(B * H * triton.cdiv(V, chosen["BV"]),)](
        q_TMK, k_TMK, v_THV, state_JHKV, slots_B, cu_seqlens_X, solve, reads, scales, o_THV,
        *strides, v_THV.stride(0), v_THV.stride(1), state_JHKV.stride(0),
        H=H, R=H // M, K=K, V=V, BK=BK, C=C, STATE=with_state, CHUNK=chunk, **chosen,
    )  # fmt: skip
    return o_THV


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
    """As the reference, in one launch. A slot below zero fills up a batch of fixed size: its output is zeros."""
    (B, H, V), M, K = z_BHV.shape, num_key_heads, state_JHKV.shape[2]
    y_BHV = torch.empty(B, H, V, dtype=qkv_BC.dtype, device=qkv_BC.device)
    if y_BHV.numel() == 0:
        return y_BHV
    whole = triton.next_power_of_2(V)
    # Few heads: all loads at once, as wide as can be. Many: small programs, of which several share a multiprocessor.
    chosen = config(
        "gated_delta_rule.decode",
        {"BV": whole, "num_warps": 16} if B * H <= 256 else {"BV": min(32, whole), "num_warps": 4},
    )
    _decode[(H, B)](
        qkv_BC, z_BHV, b_BH, a_BH, conv_JSC, state_JHKV, slots_B, conv_weight_CW, A_log_H, dt_bias_H, norm_weight_V,
        arrival_counters(qkv_BC.device, B * M), y_BHV,
        qkv_BC.stride(0), z_BHV.stride(0), b_BH.stride(0), a_BH.stride(0), conv_JSC.stride(0), qkv_BC.shape[1],
        state_JHKV.stride(0), eps,
        H=H, R=H // M, K=K, V=V, W=conv_weight_CW.shape[1], BK=triton.next_power_of_2(K),
        TILES=max(1, whole // chosen["BV"]), **chosen,
    )  # fmt: skip
    return y_BHV


@triton.jit
def _solve_chunks(
    q_ptr, k_ptr, g_ptr, beta_ptr, start_ptr, solve_ptr, reads_ptr, scales_ptr,
    q_row, q_head, k_row, k_head, g_row, beta_row, num_sequences,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What of a chunk of one head does not depend on the state.

    solve [C, C] = (I + L)^-1 diag(beta), L as in the reference; reads [C, C], the masked and decayed products of q with
    k; and four rows of factors: from the state to q's reads and to k's, from a write to the state behind the chunk, and
    from the state before the chunk to the one behind. The lengths of q and k are among the factors, so that products
    take q and k as they are.
    """
    tile, h = tl.program_id(0), tl.program_id(1)
    _, first, length, begin = locate(tile, start_ptr, num_sequences, C)
    if begin < length:
        c, d = tl.arange(0, C), tl.arange(0, BK)
        is_row = c < length - begin
        row = first + begin + c
        is_in = is_row[:, None] & (d < K)[None, :]
        q = tl.load(q_ptr + row[:, None] * q_row + (h // R) * q_head + d[None, :], is_in, 0.0)
        k = tl.load(k_ptr + row[:, None] * k_row + (h // R) * k_head + d[None, :], is_in, 0.0)
        g = tl.load(g_ptr + row * g_row + h, is_row, 0.0).to(tl.float32)
        beta = tl.load(beta_ptr + row * beta_row + h, is_row, 0.0).to(tl.float32)
        q_wide, k_wide = q.to(tl.float32), k.to(tl.float32)
        q_scale = tl.rsqrt(tl.sum(q_wide * q_wide, 1) + 1e-6) * (K**-0.5)
        k_scale = tl.rsqrt(tl.sum(k_wide * k_wide, 1) + 1e-6)

        # Sums of g between two tokens, added up rather than subtracted: differences of long sums lose their last bits.
        gap = tl.cumsum(tl.where(c[:, None] > c[None, :], g[:, None], 0.0), 0)
        since, after = tl.cumsum(g, 0), tl.sum(tl.where(c[:, None] == C - 1, gap, 0.0), 0)
        decay = tl.exp(tl.where(c[:, None] >= c[None, :], gap, float("-inf"))) * k_scale[None, :]
        reads = product(q, tl.trans(k), KEYS) * decay * q_scale[:, None]
        lower = product(k, tl.trans(k), KEYS) * decay * (beta * k_scale)[:, None]
        lower = tl.where(c[:, None] > c[None, :], lower, 0.0)

        # Inverses of the diagonal blocks of size 1, then 2, 4, ..., C: with X and Y those of a block's two halves and Z
        # the part of L below X, the block's inverse has -Y Z X there. The other way that needs only products, powers
        # of L, overflows float32 when keys repeat.
        solve = tl.where(c[:, None] == c[None, :], 1.0, 0.0)
        for step in tl.static_range(LOG_C):
            left = c[None, :] // 2**step
            below = tl.where((c[:, None] // 2**step == left + 1) & (left % 2 == 0), lower, 0.0)
            if step == 0:
                solve -= below
            else:
                solve -= product(product(solve, below, CHUNK), solve, CHUNK)
        solve *= beta[None, :]

        place = tile.to(tl.int64) * H + h
        at = place * C * C + c[:, None] * C + c[None, :]
        tl.store(solve_ptr + at, solve)
        tl.store(reads_ptr + at, reads)
        at = scales_ptr + place * 4 * C + c
        tl.store(at, tl.exp(since) * q_scale)
        tl.store(at + C, tl.exp(since) * k_scale)
        tl.store(at + 2 * C, tl.exp(after) * k_scale)
        tl.store(at + 3 * C, tl.exp(tl.sum(g, 0) + since * 0))


@triton.jit
def _scan_chunks(
    q_ptr, k_ptr, v_ptr, state_ptr, slot_ptr, start_ptr, solve_ptr, reads_ptr, scales_ptr, o_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, state_slot,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The chunks of one sequence and head in order, for some of the value dimensions."""
    parts: tl.constexpr = (V + BV - 1) // BV  # of a head; neighbours, so that they find q and k in the cache
    part, head = tl.program_id(0) % parts, tl.program_id(0) // parts
    b, h = head // H, head % H
    c, d, e = tl.arange(0, C), tl.arange(0, BK), part * BV + tl.arange(0, BV)
    first = tl.load(start_ptr + b)
    length = (tl.load(start_ptr + b + 1) - first).to(tl.int32)
    slot = tl.load(slot_ptr + b)
    if (length > 0) & (slot >= 0):
        state_at = state_ptr + slot * state_slot + h * K * V + (d[:, None] * V + e[None, :])
        is_state = (d < K)[:, None] & (e < V)[None, :]
        S = tl.load(state_at, is_state, 0.0).to(tl.float32)
        place = (first // C + b) * H + h
        for begin in range(0, length, C):
            is_row = c < length - begin
            is_key, is_value = is_row[:, None] & (d < K)[None, :], is_row[:, None] & (e < V)[None, :]
            row = first + begin  # a scalar, as all that is large: within a tile, distances fit into 32 bits
            q = tl.load(q_ptr + row * q_row + (h // R) * q_head + (c[:, None] * q_row + d[None, :]), is_key, 0.0)
            k = tl.load(k_ptr + row * k_row + (h // R) * k_head + (c[:, None] * k_row + d[None, :]), is_key, 0.0)
            v = tl.load(v_ptr + row * v_row + h * v_head + (c[:, None] * v_row + e[None, :]), is_value, 0.0)
            at = c[:, None] * C + c[None, :]
            solve, reads = tl.load(solve_ptr + place * C * C + at), tl.load(reads_ptr + place * C * C + at)
            at = scales_ptr + place * 4 * C
            to_read, to_recall, to_keep = tl.load(at + c), tl.load(at + C + c), tl.load(at + 2 * C + c)
            through = tl.load(at + 3 * C)
            place += H

            lacks = product(solve, v - to_recall[:, None] * product(k, S, STATE), CHUNK)
            o = to_read[:, None] * product(q, S, STATE) + product(reads, lacks, CHUNK)
            tl.store(
                o_ptr + (row * H + h) * V + (c[:, None] * (H * V) + e[None, :]),
                cast(o, o_ptr.dtype.element_ty),
                is_value,
            )
            S = S * through + product(tl.trans(k), to_keep[:, None] * lacks, STATE)
        tl.store(state_at, cast(S, state_ptr.dtype.element_ty), is_state)


@triton.jit
def _decode(
    x_ptr, z_ptr, b_ptr, a_ptr, conv_ptr, state_ptr, slot_ptr, weight_ptr, a_log_ptr, dt_bias_ptr, norm_ptr,
    arrived_ptr, y_ptr,
    x_row, z_row, b_row, a_row, conv_slot, conv_row, state_slot, eps,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One token of one sequence for one value head, the state in TILES tiles of BV value dimensions."""
    h, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, j, i = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, TILES)
    e = i[:, None] * BV + j[None, :]
    is_key = d < K
    slot = tl.load(slot_ptr + n)
    y_at = y_ptr + (n * H + h) * V + e
    if slot < 0:
        tl.store(y_at, tl.zeros([TILES, BV], y_ptr.dtype.element_ty), e < V)
    else:
        state_at = state_ptr + slot * state_slot + h * K * V + (d[:, None] * V + j[None, :])
        S = tl.load(state_at, is_key[:, None] & (j < V)[None, :], 0.0).to(tl.float32)  # what takes the time comes first

        past_at, x_at = conv_ptr + slot * conv_slot, x_ptr + n * x_row
        q_channel = (h // R) * K + d
        k_channel = (H // R) * K + q_channel
        v_channel = (2 * (H // R)) * K + h * V
        q = convolve(x_at, past_at, weight_ptr, None, q_channel, is_key, conv_row, W)
        k = convolve(x_at, past_at, weight_ptr, None, k_channel, is_key, conv_row, W)
        q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * (K**-0.5)
        k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
        qk = tl.sum(q * k, 0)
        beta = 1 / (1 + tl.exp(-tl.load(b_ptr + n * b_row + h).to(tl.float32)))
        dt = softplus(tl.load(a_ptr + n * a_row + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32))
        decay = tl.exp(-tl.exp(tl.load(a_log_ptr + h).to(tl.float32)) * dt)

        y = tl.zeros([TILES, BV], tl.float32)
        for tile in tl.static_range(TILES):
            is_value = tile * BV + j < V
            if tile + 1 < TILES:  # ask for the next before the store that it could not overtake
                is_next = (tile + 1) * BV + j < V
                following = tl.load(state_at + (tile + 1) * BV, is_key[:, None] & is_next[None, :], 0.0).to(tl.float32)
            v = convolve(x_at, past_at, weight_ptr, None, v_channel + tile * BV + j, is_value, conv_row, W)
            lacks = beta * (v - decay * tl.sum(k[:, None] * S, 0))
            # What q reads after the write, without waiting for it.
            y = tl.where(i[:, None] == tile, (decay * tl.sum(q[:, None] * S, 0) + qk * lacks)[None, :], y)
            S = decay * S + k[:, None] * lacks[None, :]
            tl.store(state_at + tile * BV, S, is_key[:, None] & is_value[None, :])
            if tile + 1 < TILES:
                S = following
        z = tl.load(z_ptr + n * z_row + h * V + e, e < V, 0.0).to(tl.float32)
        y *= tl.rsqrt(tl.sum(tl.sum(y * y, 0), 0) / V + eps) * tl.load(norm_ptr + e, e < V, 0.0).to(tl.float32)
        tl.store(y_at, cast(y * silu(z), y_ptr.dtype.element_ty), e < V)

        # The R programs of a key head all read its past inputs of q and k; the last to have done so moves them on.
        tl.debug_barrier()
        for tile in tl.static_range(TILES):
            shift(x_at, past_at, v_channel + tile * BV + j, tile * BV + j < V, conv_row, W)
        arrived_at = arrived_ptr + n * (H // R) + h // R
        if tl.atomic_add(arrived_at, 1, sem="acq_rel") == R - 1:
            shift(x_at, past_at, q_channel, is_key, conv_row, W)
            shift(x_at, past_at, k_channel, is_key, conv_row, W)
            tl.store(arrived_at, 0)
