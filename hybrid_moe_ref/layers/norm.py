"""Root-mean-square norms, computed in float32 (float64 for float64 inputs) and cast last.

Shapes: ... anything, H features, G groups of features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _normalise(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight): the weight is an offset from one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x__H: Tensor) -> Tensor:
        y__H = _normalise(_widen(x__H), self.eps)
        return torch.addcmul(y__H, y__H, _widen(self.weight)).to(x__H.dtype)


class NormThenGate(nn.Module):
    """weight * x / rms(x) * silu(gate): Gated DeltaNet's output norm, over each head."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x__H: Tensor, gate__H: Tensor) -> Tensor:
        y = _widen(self.weight) * _normalise(_widen(x__H), self.eps)
        return (y * F.silu(_widen(gate__H))).to(x__H.dtype)


class GateThenNorm(nn.Module):
    """weight * y / rms(y) with y = x * silu(gate): Mamba-2's output norm; the mean square is over each
    group."""

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x__H: Tensor, gate__H: Tensor) -> Tensor:
        y = _widen(x__H) * F.silu(_widen(gate__H))
        y = _normalise(y.unflatten(-1, (self.num_groups, -1)), self.eps).flatten(-2)
        return (_widen(self.weight) * y).to(x__H.dtype)
