"""The gated delta rule over prompts of any lengths, in Triton.

There are two launches. The first processes all chunks at once and computes the values that do not depend on the
state. The second goes through the chunks of each sequence in order, with the state in registers. For each token and
value head of 128 x 128 in bfloat16, the second launch reads v (256 B), the normalised q and k (512 B, mostly from L2,
because value heads share them) and two rows that the first launch computed (256 B), and writes o (256 B). A head has
V / BV programs, each for BV value dimensions, and each program reads q, k and the two rows. The state is read and
written once per prompt.

Shapes: T tokens of all sequences, one after another, B sequences, H value heads, M key heads, R = H / M value heads of
a key head, K key dim, V value dim, C tokens of a chunk, J slots (each holds the state of one sequence), X = B + 1
bounds (sequence b is between bounds b and b + 1).
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import cast, config, locate, num_tiles, product
from torch import Tensor

CONFIGS = [
    {"BV": BV, "num_warps": warps, "num_stages": stages}
    for BV, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
    for stages in (2, 3)  # with one stage, Triton 3.6 compiles the sizes (32, 4) wrongly for an H200
]


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
    """Apply the gated delta rule to all tokens of several sequences, in Triton.

    Same arguments and result as `reference.prefill`. The state is float32.

    For bfloat16 inputs, the operands of products are float16. The 11 bits of float16 are too few if heads are small
    and the state consists of corrections, for example because all keys are equal. So if K <= 16, the operands are
    float32. If 16 < K <= 64, each number that is read from the state or written to it is split into two float16 parts.
    If K > 64, as in large models (K = 128), neither is needed. There, to split only the numbers that are read would
    already cost 6 % of the time.
    """
    (T, M, K), (_, H, V), B = q_TMK.shape, v_THV.shape, slots_B.shape[0]
    o_THV = torch.empty(v_THV.shape, dtype=v_THV.dtype, device=v_THV.device)
    if o_THV.numel() == 0:
        return o_THV
    is_wide = q_TMK.dtype == torch.float32 or K <= 16
    kind, dtype, C = ("tf32x3", torch.float32, 32) if is_wide else ("f16", torch.float16, 64)
    with_state = "f16x2" if kind == "f16" and K <= 64 else kind
    BK = max(16, triton.next_power_of_2(K))
    tiles = num_tiles(T, B, C)
    unit_q_TMK, unit_k_TMK = torch.empty(2, T, M, K, dtype=dtype, device=q_TMK.device)
    solve, reads = torch.empty(2, tiles, H, C, C, dtype=dtype, device=q_TMK.device)
    scales = torch.empty(tiles, H, 3, C, dtype=torch.float32, device=q_TMK.device)
    _prepare_chunks[(tiles, H)](
        q_TMK, k_TMK, g_TH, beta_TH, cu_seqlens_X, unit_q_TMK, unit_k_TMK, solve, reads, scales,
        q_TMK.stride(0), q_TMK.stride(1), k_TMK.stride(0), k_TMK.stride(1), g_TH.stride(0), beta_TH.stride(0), B,
        H=H, R=H // M, K=K, BK=BK, C=C, LOG_HALF=C.bit_length() - 2, KIND=kind, num_warps=4,
    )  # fmt: skip
    tiling = {"BV": 16, "num_warps": 2} if kind == "tf32x3" else {"BV": 32, "num_warps": 4}
    chosen = config("gated_delta_rule.prefill", {**tiling, "num_stages": 2})
    _scan_chunks[(B * H * triton.cdiv(V, chosen["BV"]),)](
        unit_q_TMK, unit_k_TMK, v_THV, state_JHKV, slots_B, cu_seqlens_X, solve, reads, scales, o_THV,
        v_THV.stride(0), v_THV.stride(1), state_JHKV.stride(0),
        H=H, R=H // M, K=K, V=V, BK=BK, C=C, KIND=kind, STATE=with_state, **chosen,
    )  # fmt: skip
    return o_THV


@triton.jit
def _prepare_chunks(
    q_ptr, k_ptr, g_ptr, beta_ptr, start_ptr, unit_q_ptr, unit_k_ptr, solve_ptr, reads_ptr, scales_ptr,
    q_row, q_head, k_row, k_head, g_row, beta_row, num_sequences,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LOG_HALF: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Compute those values of one chunk of one head that do not depend on the state.

    Writes:

    unit_q, unit_k  q and k, normalised to length 1
    solve [C, C]    (I + L)^-1 diag(beta), with L as in `reference._by_chunks`
    reads [C, C]    the products of q with k, masked and decayed
    scales [3, C]   the decay from the state before the chunk to each read, from each write to the state after the
                    chunk, and from the state before the chunk to the state after it

    The tokens of the chunk are computed in two halves, because L is zero above its diagonal. Let X and Y be the
    inverses of the first and the second half of I + L, and Z the block of L below the first half. Then the inverse of
    I + L has X and Y on its diagonal, and -Y Z X at the place of Z.
    """
    tile, h = tl.program_id(0), tl.program_id(1)
    _, first, length, begin = locate(tile, start_ptr, num_sequences, C)
    if begin < length:
        HALF: tl.constexpr = C // 2
        c, d = tl.arange(0, HALF), tl.arange(0, BK)
        row, left = first + begin, length - begin
        is_a, is_b = c < left, c + HALF < left
        g_at, beta_at = g_ptr + row * g_row + h, beta_ptr + row * beta_row + h
        g_a, beta_a = _numbers(g_at + c * g_row, is_a), _numbers(beta_at + c * beta_row, is_a)
        g_b, beta_b = _numbers(g_at + (c + HALF) * g_row, is_b), _numbers(beta_at + (c + HALF) * beta_row, is_b)
        # The sum of g between two tokens is computed term by term: a difference of two long sums would lose its last
        # bits.
        decay_a, after_a = _decay(g_a, c, HALF)
        decay_b, after_b = _decay(g_b, c, HALF)
        since_a, since_b, sum_a, sum_b = tl.cumsum(g_a, 0), tl.cumsum(g_b, 0), tl.sum(g_a, 0), tl.sum(g_b, 0)
        decay_ba = tl.exp(since_b[:, None] + after_a[None, :])
        place = tile.to(tl.int64) * H + h
        at = scales_ptr + place * 3 * C + c
        tl.store(at, tl.exp(since_a))
        tl.store(at + HALF, tl.exp(sum_a + since_b))
        tl.store(at + C, tl.exp(after_a + sum_b))
        tl.store(at + C + HALF, tl.exp(after_b))
        tl.store(at + 2 * C, tl.exp(sum_a + sum_b + c * 0.0))

        q_at, k_at = q_ptr + row * q_row + (h // R) * q_head, k_ptr + row * k_row + (h // R) * k_head
        dtype: tl.constexpr = unit_q_ptr.dtype.element_ty
        k_a, k_b = _unit(k_at, k_row, c, d, is_a, K, dtype), _unit(k_at, k_row, c + HALF, d, is_b, K, dtype)
        q_a, q_b = _unit(q_at, q_row, c, d, is_a, K, dtype), _unit(q_at, q_row, c + HALF, d, is_b, K, dtype)
        if h % R == 0:  # once for all value heads of a key head
            unit = (row * (H // R) + h // R) * K + (c[:, None] * (H // R * K) + d[None, :])
            is_key_a, is_key_b = is_a[:, None] & (d < K)[None, :], is_b[:, None] & (d < K)[None, :]
            tl.store(unit_k_ptr + unit, k_a, is_key_a)
            tl.store(unit_k_ptr + unit + HALF * (H // R) * K, k_b, is_key_b)
            tl.store(unit_q_ptr + unit, q_a, is_key_a)
            tl.store(unit_q_ptr + unit + HALF * (H // R) * K, q_b, is_key_b)

        scale: tl.constexpr = K**-0.5
        zero = tl.zeros([HALF, HALF], dtype)
        at = reads_ptr + place * C * C + c[:, None] * C + c[None, :]
        tl.store(at, cast(product(q_a, tl.trans(k_a), KIND) * decay_a * scale, dtype))
        tl.store(at + HALF, zero)
        tl.store(at + HALF * C, cast(product(q_b, tl.trans(k_a), KIND) * decay_ba * scale, dtype))
        tl.store(at + HALF * C + HALF, cast(product(q_b, tl.trans(k_b), KIND) * decay_b * scale, dtype))

        is_below = c[:, None] > c[None, :]
        lower_a = tl.where(is_below, product(k_a, tl.trans(k_a), KIND) * decay_a * beta_a[:, None], 0.0)
        lower_b = tl.where(is_below, product(k_b, tl.trans(k_b), KIND) * decay_b * beta_b[:, None], 0.0)
        lower_ba = product(k_b, tl.trans(k_a), KIND) * decay_ba * beta_b[:, None]
        solve_a, solve_b = _invert(lower_a, c, LOG_HALF, KIND), _invert(lower_b, c, LOG_HALF, KIND)
        solve_ba = -product(product(solve_b, lower_ba, KIND), solve_a, KIND)
        at = solve_ptr + place * C * C + c[:, None] * C + c[None, :]
        tl.store(at, cast(solve_a * beta_a[None, :], dtype))
        tl.store(at + HALF, zero)
        tl.store(at + HALF * C, cast(solve_ba * beta_a[None, :], dtype))
        tl.store(at + HALF * C + HALF, cast(solve_b * beta_b[None, :], dtype))


@triton.jit
def _unit(at, row, c, d, is_row, K: tl.constexpr, dtype: tl.constexpr):
    """Load the rows with the indices `c`, and normalise each row to length 1."""
    x = _numbers(at + (c[:, None] * row + d[None, :]), is_row[:, None] & (d < K)[None, :])
    return cast(x * tl.rsqrt(tl.sum(x * x, 1) + 1e-6)[:, None], dtype)


@triton.jit
def _numbers(at, is_in):
    return tl.load(at, is_in, 0.0).to(tl.float32)


@triton.jit
def _decay(g, c, SIZE: tl.constexpr):
    """Return the decay [i, j] from a write at token j to a read at token i, and the sum of g after each token.

    The decay is zero for i < j.
    """
    gap = tl.cumsum(tl.where(c[:, None] > c[None, :], g[:, None], 0.0), 0)
    after = tl.sum(tl.where(c[:, None] == SIZE - 1, gap, 0.0), 0)
    return tl.exp(tl.where(c[:, None] >= c[None, :], gap, float("-inf"))), after


@triton.jit
def _invert(lower, c, LOG_SIZE: tl.constexpr, KIND: tl.constexpr):
    """Return (I + lower)^-1. Invert the blocks of size 1 on the diagonal first, and then those of size 2, 4, ...

    Let X and Y be the inverses of the two halves of a block, and Z the part of `lower` below X. Then the inverse of the
    block has X and Y on its diagonal, and -Y Z X at the place of Z. Powers of `lower` would also need only products,
    but overflow float32 if keys repeat.
    """
    inverse = tl.where(c[:, None] == c[None, :], 1.0, 0.0)
    for step in tl.static_range(LOG_SIZE):
        left = c[None, :] // 2**step
        below = tl.where((c[:, None] // 2**step == left + 1) & (left % 2 == 0), lower, 0.0)
        if step == 0:
            inverse -= below
        else:
            inverse -= product(product(inverse, below, KIND), inverse, KIND)
    return inverse


@triton.jit
def _scan_chunks(
    q_ptr, k_ptr, v_ptr, state_ptr, slot_ptr, start_ptr, solve_ptr, reads_ptr, scales_ptr, o_ptr,
    v_row, v_head, state_slot,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, KIND: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Process the chunks of one sequence and head in order, for some of the value dimensions.

    Operands of float16 products must stay below 65,504. q, k, solve and reads are at most 1. If state and v are at most
    64, what a chunk writes is below 64 x 64 + 64 x sqrt(K) x 64, which is 50,437 for K <= 128. Larger states and v are
    scaled down to 64 for the products. For K = 256 the bound is 69,632, which is too large, so it proves nothing there.
    """
    parts: tl.constexpr = (
        V + BV - 1
    ) // BV  # programs of one head are neighbours, so that they find q and k in the cache
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
        key_row: tl.constexpr = H // R * K
        for begin in range(0, length, C):
            is_row = c < length - begin
            is_key, is_value = is_row[:, None] & (d < K)[None, :], is_row[:, None] & (e < V)[None, :]
            row = first + begin  # a scalar of 64 bits; distances within a tile fit into 32 bits
            key = row * key_row + (h // R) * K + (c[:, None] * key_row + d[None, :])
            q, k = tl.load(q_ptr + key, is_key, 0.0), tl.load(k_ptr + key, is_key, 0.0)
            v = tl.load(v_ptr + row * v_row + h * v_head + (c[:, None] * v_row + e[None, :]), is_value, 0.0)
            v = v.to(tl.float32)
            at = c[:, None] * C + c[None, :]
            solve, reads = tl.load(solve_ptr + place * C * C + at), tl.load(reads_ptr + place * C * C + at)
            at = scales_ptr + place * 3 * C
            since, after, through = tl.load(at + c), tl.load(at + C + c), tl.load(at + 2 * C)
            place += H

            if KIND == "f16":
                peak = tl.maximum(tl.max(tl.max(tl.abs(S), 1), 0), tl.max(tl.max(tl.abs(v), 1), 0))
                down, up = tl.minimum(64 / peak, 1.0), tl.maximum(peak / 64, 1.0)
            else:
                down, up = 1.0, 1.0
            seen = S * down
            lacks = product(solve, v * down - since[:, None] * product(k, seen, STATE), KIND)
            o = (K**-0.5 * since)[:, None] * product(q, seen, KIND) + product(reads, lacks, KIND)
            tl.store(
                o_ptr + (row * H + h) * V + (c[:, None] * (H * V) + e[None, :]),
                cast(o * up, o_ptr.dtype.element_ty),
                is_value,
            )
            S = S * through + up * product(tl.trans(k), after[:, None] * lacks, STATE)
        tl.store(state_at, cast(S, state_ptr.dtype.element_ty), is_state)
