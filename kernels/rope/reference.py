"""Rotary position embedding in plain torch.

Shapes: T tokens, H heads, D head dim, R half of the rotary dim.
"""

import torch
from torch import Tensor


def rotate(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate dimensions i and i + R by the token's angle i, for i < R; copy the other dimensions of the head."""
    half = cos_TR.shape[-1]
    a, b, rest = x_THD.split([half, half, x_THD.shape[-1] - 2 * half], dim=-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat([*turned, rest], dim=-1)
