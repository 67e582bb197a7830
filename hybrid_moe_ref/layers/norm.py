"""Root-mean-square norms, computed in float32 (float64 for float64 inputs). The result is cast to the input's dtype.

Shapes: ... any dimensions, H features, G groups of features.
"""

import torch
from hybrid_moe_kernels import norm
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight): the weight is stored as an offset from one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x__H: Tensor) -> Tensor:
        if x__H.dim() == 2:
            y_NH: Tensor = norm.rms_norm(x__H, self.weight, self.eps)
            return y_NH
        return norm.rms_norm(_rows(x__H), self.weight, self.eps).view(x__H.shape)


class NormThenGate(nn.Module):
    """weight * x / rms(x) * silu(gate): Gated DeltaNet's output norm, computed over the features of each head."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x__H: Tensor, gate__H: Tensor) -> Tensor:
        return norm.norm_then_gate(_rows(x__H), _rows(gate__H), self.weight, self.eps).view(x__H.shape)


class GateThenNorm(nn.Module):
    """weight * y / rms(y) with y = x * silu(gate): Mamba-2's output norm.

    The mean square is computed over each of `num_groups` equal ranges of the features.
    """

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x__H: Tensor, gate__H: Tensor) -> Tensor:
        y_NH = norm.gate_then_norm(_rows(x__H), _rows(gate__H), self.weight, self.num_groups, self.eps)
        return y_NH.view(x__H.shape)


def _rows(x__H: Tensor) -> Tensor:
    return x__H if x__H.dim() == 2 else x__H.reshape(-1, x__H.shape[-1])
