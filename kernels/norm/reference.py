"""Root-mean-square norms in plain torch.

Shapes: N rows, H features, G groups of features.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.precision import narrow, widen
from torch import Tensor


def _normalise(x: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps), in five operations; torch's rms_norm takes eight."""
    root_mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return x / root_mean_square.hypot_(torch.full_like(root_mean_square, eps**0.5))


def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) * (1 + weight): the weight is an offset from one."""
    y_NH = _normalise(widen(x_NH), eps)
    return narrow(torch.addcmul(y_NH, y_NH, widen(weight_H)), x_NH.dtype)


def norm_then_gate(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return weight * x / rms(x) * silu(gate), the output norm of Gated DeltaNet. Each row is a head."""
    y_NH = widen(weight_H) * _normalise(widen(x_NH), eps)
    return narrow(y_NH * F.silu(widen(gate_NH)), x_NH.dtype)


def gate_then_norm(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, num_groups: int, eps: float) -> Tensor:
    """Return weight * y / rms(y) with y = x * silu(gate), the output norm of Mamba-2. rms is taken over each group."""
    y_NH = widen(x_NH) * F.silu(widen(gate_NH))
    y_NH = _normalise(y_NH.unflatten(-1, (num_groups, -1)), eps).flatten(-2)
    return narrow(widen(weight_H) * y_NH, x_NH.dtype)
