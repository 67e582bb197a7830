"""Root-mean-square norms in plain torch.

Shapes: N rows, H features, G groups of features.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.precision import widen
from torch import Tensor


def _normalise(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / rms(x) * (1 + weight): the weight is an offset from one."""
    y_NH = _normalise(widen(x_NH), eps)
    return torch.addcmul(y_NH, y_NH, widen(weight_H)).to(x_NH.dtype)


def norm_then_gate(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """weight * x / rms(x) * silu(gate): Gated DeltaNet's output norm, each row a head."""
    y_NH = widen(weight_H) * _normalise(widen(x_NH), eps)
    return (y_NH * F.silu(widen(gate_NH))).to(x_NH.dtype)


def gate_then_norm(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, num_groups: int, eps: float) -> Tensor:
    """weight * y / rms(y) with y = x * silu(gate): Mamba-2's output norm; the mean square is over each group."""
    y_NH = widen(x_NH) * F.silu(widen(gate_NH))
    y_NH = _normalise(y_NH.unflatten(-1, (num_groups, -1)), eps).flatten(-2)
    return (widen(weight_H) * y_NH).to(x_NH.dtype)
