"""Rotary position embedding of the first `rotary_dim` dimensions; dimension i turns together with i +
rotary_dim/2.

Shapes: B sequences, T tokens, H heads, D head dim, R rotary dim.
"""

from functools import lru_cache

import torch
from hybrid_moe_kernels import rope
from hybrid_moe_kernels.precision import wide
from torch import Tensor


def rotary_table(positions_BT: Tensor, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine for each position, [B, T, R/2], computed in float32 (float64 for float64) and cast."""
    frequencies = _frequencies(rotary_dim, theta, wide(dtype), positions_BT.device)
    angles = positions_BT[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=16)
def _frequencies(rotary_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    return 1.0 / theta**exponents


def rotate(x_BTHD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Turn each pair of dimensions by its angle; the rest of the head passes through."""
    y_THD = rope.rotate(x_BTHD.flatten(0, 1), cos_BTR.flatten(0, 1), sin_BTR.flatten(0, 1))
    return y_THD.view(x_BTHD.shape)
