"""Rotary position embedding of the first `rotary_dim` dimensions.

Dimension i and dimension i + rotary_dim / 2 form a pair, which is rotated by one angle.

Shapes: T rows, H heads, D head dim, R half of the rotary dim.
"""

from functools import lru_cache

import torch
from hybrid_moe_kernels import rope
from hybrid_moe_kernels.precision import wide
from torch import Tensor

from hybrid_moe_ref.batch import Part


def rotary_table(part: Part, rotary_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [T, R] for the T rows of a part of the batch, at the position of each row.

    R is half of ``rotary_dim``, because two dimensions share an angle.

    The table is computed in float32 (float64 if `dtype` is float64), and cast to `dtype`. `part` keeps the table for
    the other layers.
    """
    key = (rotary_dim, theta, dtype)
    if key not in part.tables:
        angles = part.positions_T[:, None] * _frequencies(rotary_dim, theta, wide(dtype), part.positions_T.device)
        part.tables[key] = angles.cos().to(dtype), angles.sin().to(dtype)
    return part.tables[key]


@lru_cache(maxsize=16)
def _frequencies(rotary_dim: int, theta: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=dtype, device=device) / rotary_dim
    return 1.0 / theta**exponents


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate each pair of dimensions by its angle; copy the other dimensions of the head.

    x_THD            T rows of H heads with D dimensions
    cos_TR, sin_TR   the result of `rotary_table`: R angles for each row
    """
    y_THD: Tensor = rope.rotate(x_THD, cos_TR, sin_TR)
    return y_THD
