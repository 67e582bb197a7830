"""Gated delta rule: a fast-weight memory that decays, and replaces what it stores for a key by a new value.

There are two operations, which update the states in their slots in place. `prefill` applies the rule to any number of
tokens of each sequence. `decode` computes, for one token of each sequence, all of Gated DeltaNet that is between the
input projection and the output projection.

Shapes: T tokens of all sequences, one after another, B sequences, X = B + 1 bounds (sequence b is between bounds
b and b + 1), M key heads, H value heads (a multiple of M; head h reads key head h // (H / M)), K key dim, V value dim,
C = 2 M K + H V channels of the convolution in the order q, k, v, W filter width, S = W - 1 inputs in a state of the
convolution, J slots (each holds the state of one sequence). States are float32, or float64 for float64 inputs.
"""

from hybrid_moe_kernels.checks import FLOATS, Sizes, cu_seqlens, slots
from hybrid_moe_kernels.precision import wide
from hybrid_moe_kernels.registry import Op
from torch import Tensor, int64


def _check_prefill(
    q_TMK: Tensor,
    k_TMK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    state_JHKV: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> None:
    sizes, dtype = Sizes(q_TMK.device), q_TMK.dtype
    sizes.take("q_TMK", q_TMK, *FLOATS)
    sizes.take("k_TMK", k_TMK, dtype)
    sizes.take("v_THV", v_THV, dtype)
    sizes.multiple("H", "M")
    sizes.take("g_TH", g_TH, wide(dtype))
    sizes.take("beta_TH", beta_TH, wide(dtype))
    sizes.take("state_JHKV", state_JHKV, wide(dtype), dense=3)
    sizes.take("slots_B", slots_B, int64)
    slots("slots_B", slots_B, state_JHKV.shape[0])
    sizes.take("cu_seqlens_X", cu_seqlens_X, int64)
    cu_seqlens("cu_seqlens_X", cu_seqlens_X, slots_B.shape[0], q_TMK.shape[0])


def _check_decode(
    qkv_BC: Tensor,
    z_BHV: Tensor,
    b_BH: Tensor,
    a_BH: Tensor,
    conv_weight_CW: Tensor,
    A_log_H: Tensor,
    dt_bias_H: Tensor,
    norm_weight_V: Tensor,
    conv_JSC: Tensor,
    state_JHKV: Tensor,
    slots_B: Tensor,
    *,
    num_key_heads: int,
    eps: float,
) -> None:
    sizes, dtype = Sizes(qkv_BC.device, M=num_key_heads), qkv_BC.dtype
    sizes.take("qkv_BC", qkv_BC, *FLOATS)
    sizes.take("z_BHV", z_BHV, dtype, dense=2)
    sizes.multiple("H", "M")
    sizes.take("b_BH", b_BH, dtype)
    sizes.take("a_BH", a_BH, dtype)
    sizes.take("conv_weight_CW", conv_weight_CW, dtype, dense=2)
    for name, x in (("A_log_H", A_log_H), ("dt_bias_H", dt_bias_H), ("norm_weight_V", norm_weight_V)):
        sizes.take(name, x, dtype)
    sizes.known["S"] = conv_weight_CW.shape[1] - 1
    sizes.take("conv_JSC", conv_JSC, dtype, dense=2)
    sizes.take("state_JHKV", state_JHKV, wide(dtype), dense=3)
    H, K, V = state_JHKV.shape[1:]
    if qkv_BC.shape[1] != 2 * num_key_heads * K + H * V:
        raise ValueError(
            f"qkv_BC: C is {qkv_BC.shape[1]}, but must be 2 M K + H V = {2 * num_key_heads * K + H * V} "
            f"(M = {num_key_heads}, H = {H}, K = {K}, V = {V})"
        )
    sizes.take("slots_B", slots_B, int64)
    slots("slots_B", slots_B, state_JHKV.shape[0])


prefill = Op(__name__, "prefill", _check_prefill)
decode = Op(__name__, "decode", _check_decode)
