"""Root-mean-square norms, computed in float32, or in float64 for float64 inputs. The result is cast to the dtype of x.

Shapes: N rows, H features, G groups of features.
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes
from hybrid_moe_kernels.registry import Op
from torch import Tensor


def _check_rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> None:
    sizes = Sizes(x_NH.device)
    sizes.take("x_NH", x_NH, *FLOATS)
    sizes.take("weight_H", weight_H, x_NH.dtype)


def _check_gated(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, eps: float) -> None:
    sizes = Sizes(x_NH.device)
    sizes.take("x_NH", x_NH, *FLOATS)
    sizes.take("gate_NH", gate_NH, x_NH.dtype)
    sizes.take("weight_H", weight_H, x_NH.dtype)


def _check_grouped(x_NH: Tensor, gate_NH: Tensor, weight_H: Tensor, num_groups: int, eps: float) -> None:
    _check_gated(x_NH, gate_NH, weight_H, eps)
    if num_groups < 1 or x_NH.shape[1] % num_groups:
        raise ValueError(f"num_groups: the value is {num_groups}, but must be a divisor of H = {x_NH.shape[1]}")


rms_norm = Op(__name__, "rms_norm", _check_rms_norm)
norm_then_gate = Op(__name__, "norm_then_gate", _check_gated)
gate_then_norm = Op(__name__, "gate_then_norm", _check_grouped)
