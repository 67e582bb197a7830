"""Root-mean-square norms in Triton: one program (an instance of the kernel) keeps several whole rows in registers.

Each input is read once and the output is written once. Rows can have any stride. `gate_then_norm` treats each group as
a row. From a few thousand rows on, a norm takes as long as a copy.

Shapes: N rows, H features, G groups of features.
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import DEVICES, DTYPES, cast, config, missing, silu
from torch import Tensor

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "gate_then_norm", "missing", "norm_then_gate", "rms_norm"]

CONFIGS = {
    "norm": [{"numbers": numbers, "num_warps": warps} for numbers in (1024, 2048, 4096) for warps in (4, 8)],
}


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square and multiply by 1 + weight, in Triton.

    Same arguments and result as `reference.rms_norm`.
    """
    return _norm(x_NH, None, weight_H, eps, 1, offset=1, gate_first=False)


def norm_then_gate(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalise, and then gate: the output norm of Gated DeltaNet, in Triton.

    Same arguments and result as `reference.norm_then_gate`.
    """
    return _norm(x_NH, gate_NH, weight_H, eps, 1, offset=0, gate_first=False)


def gate_then_norm(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, num_groups: int, eps: float) -> Tensor:
    """Gate, and then normalise: the output norm of Mamba-2, in Triton.

    Same arguments and result as `reference.gate_then_norm`.
    """
    return _norm(x_NH, gate_NH, weight_H, eps, num_groups, offset=0, gate_first=True)


def _norm(
    x_NH: Tensor,
    gate_NH: Tensor | None,
    weight_H: Tensor,
    eps: float,
    num_groups: int,
    *,
    offset: int,
    gate_first: bool,
) -> Tensor:
    (N, H), G = x_NH.shape, num_groups
    y_NH = torch.empty(N, H, dtype=x_NH.dtype, device=x_NH.device)
    if y_NH.numel() == 0:
        return y_NH
    BH = triton.next_power_of_2(H // G)
    chosen = dict(config("norm", {"numbers": 2048, "num_warps": 4 if BH <= 4096 else 16}))
    rows = max(1, chosen.pop("numbers") // BH)
    _norm_rows[(triton.cdiv(N * G, rows),)](
        x_NH, gate_NH, weight_H, y_NH, N * G, x_NH.stride(0), 0 if gate_NH is None else gate_NH.stride(0), eps,
        H=H // G, G=G, OFFSET=offset, GATE_FIRST=gate_first, ROWS=rows, BH=BH, **chosen,
    )  # fmt: skip
    return y_NH


@triton.jit
def _norm_rows(
    x_ptr, gate_ptr, weight_ptr, y_ptr, num_rows, x_row, gate_row, eps,
    H: tl.constexpr, G: tl.constexpr, OFFSET: tl.constexpr, GATE_FIRST: tl.constexpr, ROWS: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]  # rows that each have one group
    h = tl.arange(0, BH)[None, :]
    is_in = (row < num_rows) & (h < H)
    feature = (row % G) * H + h
    x = tl.load(x_ptr + (row // G) * x_row + feature, is_in, 0.0).to(tl.float32)
    if GATE_FIRST:
        x *= silu(tl.load(gate_ptr + (row // G) * gate_row + feature, is_in, 0.0).to(tl.float32))
    y = x * tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    y *= tl.load(weight_ptr + feature, is_in, 0.0).to(tl.float32) + OFFSET
    if (gate_ptr is not None) and (not GATE_FIRST):
        y *= silu(tl.load(gate_ptr + (row // G) * gate_row + feature, is_in, 0.0).to(tl.float32))
    tl.store(y_ptr + row * H + h, cast(y, y_ptr.dtype.element_ty), is_in)
