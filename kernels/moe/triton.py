"""The router and the experts in Triton. The host waits for none of their launches.

The router is one launch. `experts` has four launches:

    _plan      groups the picks by expert, and cuts each group into tiles of BM picks. If there are so few picks that
               two of them rarely share an expert, this launch is left out, and each pick is a tile.
    _gate_up   gathers the rows of each tile, multiplies them with the gate and up matrices of the tile's expert, and
               applies SiLU
    _down      multiplies with the down matrix
    _combine   sums the picks of a row with their weights, in a fixed order, so that the grouping does not change the
               result

A grid has enough Triton programs for the worst distribution of the picks over the experts. A program without a tile
ends at once.

With few rows, most of the memory traffic is the weights of the chosen experts. These are 6 H I bytes for each expert in
bfloat16 (25.2 MB for 4096 x 1024). They are read once, because BM grows with the number of picks per expert. N rows
choose E (1 - (1 - K/E)^N) of E experts on average. The gathered rows and the intermediate results are P (2 H + 2 I)
numbers. For up to 128 rows this is about 2 % of the weights.

Shapes: N rows, H hidden, E experts held, K picks (chosen experts) of a row, P = N K picks, I intermediate, J = 2 I
(gate, then up).
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import DEVICES, DTYPES, Config, cast, config, missing, product, silu
from torch import Tensor

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "experts", "missing", "route"]

CONFIGS = {
    "moe.route": [{"num_warps": warps} for warps in (1, 2, 4)],
    "moe.experts": [
        {"BM": BM, "BN": BN, "BK": BK, "num_warps": warps, "num_stages": stages}
        for BM, BN, warps in (
            (16, 32, 4),
            (16, 64, 4),
            (16, 128, 4),
            (32, 64, 4),
            (64, 64, 4),
            (64, 128, 8),
            (128, 128, 8),
        )
        for BK in (64, 128, 256)
        for stages in (3, 4)
        if (BM + 2 * BN) * BK <= 20480
    ],
}


def route(logits_NE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the experts of each row, in Triton.

    Same arguments and result as `reference.route`; of equal logits, the lower id comes first.
    """
    N, E = logits_NE.shape
    weights_NK = torch.empty(N, top_k, dtype=torch.float32, device=logits_NE.device)
    ids_NK = torch.empty(N, top_k, dtype=torch.int64, device=logits_NE.device)
    if N:
        _route[(N,)](
            logits_NE, weights_NK, ids_NK, logits_NE.stride(0),
            E=E, K=top_k, BE=triton.next_power_of_2(E), BK=triton.next_power_of_2(top_k),
            **config("moe.route", {"num_warps": 1 if E <= 1024 else 4}),
        )  # fmt: skip
    return weights_NK, ids_NK


def experts(x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Sum the outputs of the chosen experts of each row, in Triton.

    Same arguments and result as `reference.experts`. For bfloat16, the output of SiLU and each pick's result are
    rounded to bfloat16.
    """
    (N, K), (E, H, I) = ids_NK.shape, down_EHI.shape
    y_NH = torch.empty(N, H, dtype=x_NH.dtype, device=x_NH.device)
    P, dtype, device = N * K, x_NH.dtype, x_NH.device
    if y_NH.numel() == 0:
        return y_NH
    if E == 0 or P == 0:
        return y_NH.zero_()
    chosen = dict(config("moe.experts", _tiling(P, E, dtype)))
    BM, BN = chosen.pop("BM"), chosen.pop("BN")
    ids_NK = ids_NK.contiguous()
    if N == 1 or P * P <= 4 * E:  # picks rarely share an expert, so each pick is one tile
        num_tiles, tile_expert, tile_picks = P, ids_NK, None
    else:
        num_tiles = P // BM + min(E, P)
        tile_expert = torch.empty(num_tiles, dtype=torch.int32, device=device)
        tile_picks = torch.empty(num_tiles * BM, dtype=torch.int32, device=device)
        _plan[(E,)](
            ids_NK, tile_expert, tile_picks, P, num_tiles,
            E=E, BE=triton.next_power_of_2(E), BM=BM, BP=min(1024, max(32, triton.next_power_of_2(P))), num_warps=4,
        )  # fmt: skip
    kind = "tf32x3" if dtype == torch.float32 else "bf16"
    hidden_PI = torch.empty(P, I, dtype=dtype, device=device)
    _gate_up[(num_tiles, triton.cdiv(I, BN))](
        x_NH, gate_up_EJH, tile_expert, tile_picks, hidden_PI, x_NH.stride(0), gate_up_EJH.stride(0), P,
        K=K, H=H, I=I, E=E, KIND=kind, BM=BM, BN=BN, **chosen,
    )  # fmt: skip
    out_PH = torch.empty(P, H, dtype=dtype, device=device)
    BN *= 2 if BM == 16 else 1  # reading weights dominates, so read as many of them per program as _gate_up does
    _down[(num_tiles, triton.cdiv(H, BN))](
        hidden_PI, down_EHI, tile_expert, tile_picks, out_PH, down_EHI.stride(0), P,
        H=H, I=I, E=E, KIND=kind, BM=BM, BN=BN, **chosen,
    )  # fmt: skip
    BH = min(1024, triton.next_power_of_2(H))
    _combine[(N, triton.cdiv(H, BH))](
        out_PH, weights_NK, ids_NK, y_NH, weights_NK.stride(0), K=K, E=E, H=H, BH=BH, num_warps=4
    )
    return y_NH


def _tiling(num_picks: int, num_experts: int, dtype: torch.dtype) -> Config:
    """Choose the tile sizes. A tile should hold all picks of an expert, as each tile reads the expert's weights."""
    BM = min(128, max(16, triton.next_power_of_2(triton.cdiv(2 * num_picks, num_experts))))
    if dtype == torch.float32:
        return {"BM": min(BM, 32), "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
    if BM <= 32:  # small tiles, because those of one or two experts must keep the whole device busy
        return {"BM": BM, "BN": 2 * BM, "BK": 128, "num_warps": 4, "num_stages": 3 if BM == 16 else 4}
    return {"BM": BM, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _route(
    logits_ptr, weights_ptr, ids_ptr, row,
    E: tl.constexpr, K: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    e, k = tl.arange(0, BE), tl.arange(0, BK)
    logits = tl.load(logits_ptr + n * row + e, e < E, float("-inf")).to(tl.float32)
    # One integer that orders by logit, then by id; it is split again below. No two are equal, not even infinities.
    bits = logits.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (ordered.to(tl.int64) << 32) | (BE - 1 - e)
    none: tl.constexpr = -(2**63)
    key = tl.where(e < E, key, none)
    best, picks = tl.full([BK], float("-inf"), tl.float32), tl.zeros([BK], tl.int64)
    for i in range(K):
        top = tl.max(key, 0)
        key = tl.where(key == top, none, key)
        high = (top >> 32).to(tl.int32)
        logit = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        best = tl.where(k == i, logit, best)
        picks = tl.where(k == i, BE - 1 - (top & 0xFFFFFFFF), picks)
    # A softmax over all, renormalised over some, is the softmax over these.
    weights = tl.where(k < K, tl.exp(best - tl.max(best, 0)), 0.0)
    tl.store(weights_ptr + n * K + k, weights / tl.sum(weights, 0), k < K)
    tl.store(ids_ptr + n * K + k, picks, k < K)


@triton.jit
def _plan(
    ids_ptr, tile_expert_ptr, tile_picks_ptr, num_picks, num_tiles,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the tiles of one expert: for each tile, the expert's id and the numbers of BM picks.

    Places without a pick get num_picks, which is not the number of any pick. Tiles without an expert get the id -1.

    Every Triton program counts all picks, which saves a launch and keeps the picks of a tile in their original order.
    """
    expert = tl.program_id(0)
    p, e, m = tl.arange(0, BP), tl.arange(0, BE), tl.arange(0, BM)
    counts = tl.zeros([BE], tl.int32)
    for start in range(0, num_picks, BP):
        ids = tl.load(ids_ptr + start + p, start + p < num_picks, -1)
        is_held = (ids >= 0) & (ids < E)
        counts += tl.histogram(tl.where(is_held, ids, 0).to(tl.int32), BE)
        counts -= tl.where(e == 0, tl.sum((~is_held).to(tl.int32), 0), 0)
    tiles = (counts + BM - 1) // BM
    first_tile = tl.sum(tl.where(e < expert, tiles, 0), 0)
    mine = tl.sum(tl.where(e == expert, counts, 0), 0)
    end = first_tile + (mine + BM - 1) // BM
    for tile in range(first_tile, end):
        tl.store(tile_expert_ptr + tile, expert)
        tl.store(tile_picks_ptr + tile * BM + m, num_picks + m * 0, (tile - first_tile) * BM + m >= mine)
    done = first_tile * BM
    for start in range(0, num_picks, BP):
        ids = tl.load(ids_ptr + start + p, start + p < num_picks, -1)
        is_mine = (ids == expert).to(tl.int32)
        tl.store(tile_picks_ptr + done + tl.cumsum(is_mine, 0) - 1, start + p, is_mine == 1)
        done += tl.sum(is_mine, 0)
    if expert == E - 1:
        for start in range(end, num_tiles, BP):
            tl.store(tile_expert_ptr + start + p, p * 0 - 1, start + p < num_tiles)


@triton.jit
def _picks(tile_picks_ptr, tile, num_picks, BM: tl.constexpr):
    """Return the BM picks of a tile. Unused places have the number num_picks, which no pick has.

    If tile_picks_ptr is None, `_plan` was left out: each pick is a tile of its own, with the same number.
    """
    m = tl.arange(0, BM)
    if tile_picks_ptr is None:
        pick = tl.where(m == 0, tile, num_picks)
    else:
        pick = tl.load(tile_picks_ptr + tile * BM + m)
    return pick.to(tl.int64)


@triton.jit
def _gate_up(
    x_ptr, weight_ptr, tile_expert_ptr, tile_picks_ptr, hidden_ptr, x_row, weight_expert, num_picks,
    K: tl.constexpr, H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute hidden[p] = silu(gate x) * (up x) for the picks of a tile and BN of the intermediate dimensions."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if (expert >= 0) & (expert < E):
        pick = _picks(tile_picks_ptr, tile, num_picks, BM)
        is_pick = (pick < num_picks)[:, None]
        i, h = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        x_at = x_ptr + (pick // K)[:, None] * x_row + h[None, :]
        gate_at = weight_ptr + expert * weight_expert + (i[None, :] * H + h[:, None])
        gate, up = tl.zeros([BM, BN], tl.float32), tl.zeros([BM, BN], tl.float32)
        for start in range(0, H, BK):
            is_weight = (i < I)[None, :] & (start + h < H)[:, None]
            x = tl.load(x_at + start, is_pick & (start + h < H)[None, :], 0.0)
            gate += product(x, tl.load(gate_at + start, is_weight, 0.0), KIND)
            up += product(x, tl.load(gate_at + I * H + start, is_weight, 0.0), KIND)
        hidden = cast(silu(gate) * up, hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + pick[:, None] * I + i[None, :], hidden, is_pick & (i < I)[None, :])


@triton.jit
def _down(
    hidden_ptr, weight_ptr, tile_expert_ptr, tile_picks_ptr, out_ptr, weight_expert, num_picks,
    H: tl.constexpr, I: tl.constexpr, E: tl.constexpr, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Compute out[p] = down hidden[p] for the picks of a tile and BN of the hidden dimensions."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile).to(tl.int64)
    if (expert >= 0) & (expert < E):
        pick = _picks(tile_picks_ptr, tile, num_picks, BM)
        is_pick = (pick < num_picks)[:, None]
        h, i = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
        hidden_at = hidden_ptr + pick[:, None] * I + i[None, :]
        weight_at = weight_ptr + expert * weight_expert + (h[None, :] * I + i[:, None])
        out = tl.zeros([BM, BN], tl.float32)
        for start in range(0, I, BK):
            hidden = tl.load(hidden_at + start, is_pick & (start + i < I)[None, :], 0.0)
            weight = tl.load(weight_at + start, (h < H)[None, :] & (start + i < I)[:, None], 0.0)
            out += product(hidden, weight, KIND)
        out = cast(out, out_ptr.dtype.element_ty)
        tl.store(out_ptr + pick[:, None] * H + h[None, :], out, is_pick & (h < H)[None, :])


@triton.jit
def _combine(
    out_ptr, weights_ptr, ids_ptr, y_ptr, weights_row,
    K: tl.constexpr, E: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Compute y[n], the weighted sum of the row's picks whose expert is held. `out` is undefined for other picks."""
    n = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    y = tl.zeros([BH], tl.float32)
    for k in range(K):
        expert = tl.where(h < H, tl.load(ids_ptr + n * K + k), -1)
        is_held = (expert >= 0) & (expert < E)
        out = tl.load(out_ptr + (n * K + k) * H + h, is_held, 0.0).to(tl.float32)
        y += out * tl.load(weights_ptr + n * weights_row + k).to(tl.float32)
    tl.store(y_ptr + n * H + h, cast(y, y_ptr.dtype.element_ty), h < H)
