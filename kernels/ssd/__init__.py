"""State space duality (Mamba-2): a linear recurrence with one decay per head.

There are two operations, which update the states in their slots in place. `prefill` applies the recurrence to any
number of tokens of each sequence. `decode` computes, for one token of each sequence, all of Mamba-2 that is between the
input projection and the output projection.

Shapes: T tokens of all sequences, one after another, B sequences, X = B + 1 bounds (sequence b is between bounds
b and b + 1), H heads, P head dim, G groups of heads that share b and c (head h reads group h // (H / G)), N state size,
I = H P dims of all heads, C = I + 2 G N channels of the convolution in the order x, b, c, W filter width, S = W - 1
inputs in a state of the convolution, J slots (each holds the state of one sequence). States are float32, or float64 for
float64 inputs.
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes, cu_seqlens, slots
from hybrid_moe_kernels.precision import wide
from hybrid_moe_kernels.registry import Op
from torch import Tensor, int64


def _check_prefill(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    D_H: Tensor,
    state_JHPN: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> None:
    sizes, dtype = Sizes(x_THP.device), x_THP.dtype
    sizes.take("x_THP", x_THP, *FLOATS)
    sizes.take("dt_TH", dt_TH, wide(dtype))
    sizes.take("A_H", A_H, wide(dtype))
    sizes.take("b_TGN", b_TGN, dtype)
    sizes.take("c_TGN", c_TGN, dtype)
    sizes.multiple("H", "G")
    sizes.take("D_H", D_H, dtype)
    sizes.take("state_JHPN", state_JHPN, wide(dtype), dense=3)
    sizes.take("slots_B", slots_B, int64)
    slots("slots_B", slots_B, state_JHPN.shape[0])
    sizes.take("cu_seqlens_X", cu_seqlens_X, int64)
    cu_seqlens("cu_seqlens_X", cu_seqlens_X, slots_B.shape[0], x_THP.shape[0])


def _check_decode(
    xbc_BC: Tensor,
    z_BI: Tensor,
    dt_BH: Tensor,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    A_log_H: Tensor,
    D_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_I: Tensor | None,
    conv_JSC: Tensor,
    state_JHPN: Tensor,
    slots_B: Tensor,
    *,
    num_groups: int,
    dt_limit: tuple[float, float | None],
    eps: float,
) -> None:
    sizes, dtype = Sizes(xbc_BC.device, G=num_groups), xbc_BC.dtype
    sizes.take("xbc_BC", xbc_BC, *FLOATS)
    sizes.take("z_BI", z_BI, dtype)
    sizes.take("dt_BH", dt_BH, dtype)
    sizes.multiple("H", "G")
    sizes.take("conv_weight_CW", conv_weight_CW, dtype, dense=2)
    optional = (("conv_bias_C", conv_bias_C), ("norm_weight_I", norm_weight_I))
    for name, x in (*optional, ("A_log_H", A_log_H), ("D_H", D_H), ("dt_bias_H", dt_bias_H)):
        if x is not None:
            sizes.take(name, x, dtype)
    sizes.known["S"] = conv_weight_CW.shape[1] - 1
    sizes.take("conv_JSC", conv_JSC, dtype, dense=2)
    sizes.take("state_JHPN", state_JHPN, wide(dtype), dense=3)
    H, P, N = state_JHPN.shape[1:]
    if z_BI.shape[1] != H * P:
        raise ValueError(f"z_BI: I is {z_BI.shape[1]}, but must be H P = {H * P} (H = {H}, P = {P})")
    if xbc_BC.shape[1] != H * P + 2 * num_groups * N:
        raise ValueError(
            f"xbc_BC: C is {xbc_BC.shape[1]}, but must be H P + 2 G N = {H * P + 2 * num_groups * N} "
            f"(H = {H}, P = {P}, G = {num_groups}, N = {N})"
        )
    sizes.take("slots_B", slots_B, int64)
    slots("slots_B", slots_B, state_JHPN.shape[0])


prefill = Op(__name__, "prefill", _check_prefill)
decode = Op(__name__, "decode", _check_decode)
