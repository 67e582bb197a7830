"""Short depthwise causal convolution with SiLU. The state of a sequence is its last inputs.

Shapes: T tokens of all sequences, one after another, B sequences, C channels, W filter width, S = W - 1 inputs in a
state, J slots (each holds the state of one sequence), X = B + 1 bounds (sequence b is between bounds b and b + 1).
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes, cu_seqlens, slots
from hybrid_moe_kernels.registry import Op
from torch import Tensor, int64


def _check(x: Tensor, name: str, weight_CW: Tensor, bias_C: Tensor | None, state_JSC: Tensor, slots_B: Tensor) -> Sizes:
    sizes = Sizes(x.device)
    sizes.take(name, x, *FLOATS)
    sizes.take("weight_CW", weight_CW, x.dtype, dense=2)
    sizes.known["S"] = weight_CW.shape[1] - 1
    if bias_C is not None:
        sizes.take("bias_C", bias_C, x.dtype)
    sizes.take("state_JSC", state_JSC, x.dtype, dense=2)
    sizes.take("slots_B", slots_B, int64)
    slots("slots_B", slots_B, state_JSC.shape[0])
    return sizes


def _check_prefill(
    x_TC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None,
    state_JSC: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> None:
    sizes = _check(x_TC, "x_TC", weight_CW, bias_C, state_JSC, slots_B)
    sizes.take("cu_seqlens_X", cu_seqlens_X, int64)
    cu_seqlens("cu_seqlens_X", cu_seqlens_X, slots_B.shape[0], x_TC.shape[0])


def _check_update(x_BC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, state_JSC: Tensor, slots_B: Tensor) -> None:
    _check(x_BC, "x_BC", weight_CW, bias_C, state_JSC, slots_B)


prefill = Op(__name__, "prefill", _check_prefill)
update = Op(__name__, "update", _check_update)
