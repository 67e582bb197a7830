"""Mixture of experts: the router chooses experts for each row, and each expert processes the rows that chose it.

Shapes: N rows, H hidden, E experts (in `experts`, only those that this rank holds), K picks (chosen experts) of a row,
I intermediate, J = 2 I (gate, then up), S intermediate of the shared expert.
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes
from hybrid_moe_kernels.precision import wide
from hybrid_moe_kernels.registry import Op
from torch import Tensor, int64


def _check_route(logits_NE: Tensor, top_k: int) -> None:
    Sizes(logits_NE.device).take("logits_NE", logits_NE, *FLOATS)
    if not 1 <= top_k <= logits_NE.shape[1]:
        raise ValueError(f"top_k: the value is {top_k}, but must be from 1 to E = {logits_NE.shape[1]}")


def _check_experts(x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> None:
    sizes, dtype = Sizes(x_NH.device), x_NH.dtype
    sizes.take("x_NH", x_NH, *FLOATS)
    sizes.take("weights_NK", weights_NK, dtype, wide(dtype))
    sizes.take("ids_NK", ids_NK, int64)
    sizes.take("gate_up_EJH", gate_up_EJH, dtype, dense=2)
    sizes.take("down_EHI", down_EHI, dtype, dense=2)
    if gate_up_EJH.shape[1] != 2 * down_EHI.shape[2]:
        raise ValueError(f"gate_up_EJH: J is {gate_up_EJH.shape[1]}, but must be 2 I = {2 * down_EHI.shape[2]}")


def _check_mixture(
    x_NH: Tensor,
    router_EH: Tensor,
    gate_up_EJH: Tensor,
    down_EHI: Tensor,
    shared_gate_SH: Tensor,
    shared_up_SH: Tensor,
    shared_down_HS: Tensor,
    shared_scale_1H: Tensor,
    *,
    top_k: int,
) -> None:
    sizes, dtype = Sizes(x_NH.device), x_NH.dtype
    sizes.take("x_NH", x_NH, *FLOATS)
    sizes.take("router_EH", router_EH, dtype, dense=2)
    sizes.take("gate_up_EJH", gate_up_EJH, dtype, dense=2)
    sizes.take("down_EHI", down_EHI, dtype, dense=2)
    sizes.take("shared_gate_SH", shared_gate_SH, dtype, dense=2)
    sizes.take("shared_up_SH", shared_up_SH, dtype, dense=2)
    sizes.take("shared_down_HS", shared_down_HS, dtype, dense=2)
    sizes.known["1"] = 1
    sizes.take("shared_scale_1H", shared_scale_1H, dtype)
    if gate_up_EJH.shape[1] != 2 * down_EHI.shape[2]:
        raise ValueError(f"gate_up_EJH: J is {gate_up_EJH.shape[1]}, but must be 2 I = {2 * down_EHI.shape[2]}")
    if not 1 <= top_k <= router_EH.shape[0]:
        raise ValueError(f"top_k: the value is {top_k}, but must be from 1 to E = {router_EH.shape[0]}")


route = Op(__name__, "route", _check_route)
experts = Op(__name__, "experts", _check_experts)
mixture = Op(__name__, "mixture", _check_mixture)
