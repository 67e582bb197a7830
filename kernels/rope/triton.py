"""Rotary position embedding in Triton: each program (instance of the kernel) rotates some heads of one token.

Each number of x is read from memory once (the two dimensions that are rotated together are in the same cache lines),
and each number of y is written once. The R angles of a token are read once for every HEADS heads.

Shapes: T tokens, H heads, D head dim, R half of the rotary dim.
"""

import torch
import triton
import triton.language as tl
from hybrid_moe_kernels.tile import DEVICES, DTYPES, cast, config, missing
from torch import Tensor

__all__ = ["CONFIGS", "DEVICES", "DTYPES", "missing", "rotate"]

CONFIGS = {"rope.rotate": [{"HEADS": heads, "num_warps": warps} for heads in (4, 8, 16) for warps in (2, 4, 8)]}


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first dimensions of each head by the token's angles, in Triton.

    Same arguments and result as `reference.rotate`.
    """
    (T, H, D), R = x_THD.shape, cos_TR.shape[1]
    y_THD = torch.empty(T, H, D, dtype=x_THD.dtype, device=x_THD.device)
    if y_THD.numel() == 0:
        return y_THD
    chosen = config("rope.rotate", {"HEADS": min(8, triton.next_power_of_2(H)), "num_warps": 4})
    _rotate[(T, triton.cdiv(H, chosen["HEADS"]))](
        x_THD, cos_TR, sin_TR, y_THD, x_THD.stride(0), x_THD.stride(1), cos_TR.stride(0), sin_TR.stride(0),
        H=H, D=D, R=R, BD=triton.next_power_of_2(D), **chosen,
    )  # fmt: skip
    return y_THD


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, y_ptr, x_row, x_head, cos_row, sin_row,
    H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, BD)
    is_in = (h < H) & (d < D)[None, :]
    is_turned = d < 2 * R
    partner = tl.where(d < R, d + R, d - R)
    angle = tl.where(d < R, d, d - R)
    x_at = x_ptr + t * x_row + h * x_head
    x = tl.load(x_at + d[None, :], is_in, 0.0).to(tl.float32)
    other = tl.load(x_at + partner[None, :], is_in & is_turned[None, :], 0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * cos_row + angle, is_turned, 1.0).to(tl.float32)
    sin = tl.load(sin_ptr + t * sin_row + angle, is_turned, 0.0).to(tl.float32)
    y = x * cos[None, :] + other * tl.where(d < R, -sin, sin)[None, :]
    tl.store(y_ptr + (t * H + h) * D + d[None, :], cast(y, y_ptr.dtype.element_ty), is_in)
