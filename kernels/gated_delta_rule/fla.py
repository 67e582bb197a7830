"""The gated delta rule of flash-linear-attention (fla), for comparison. Choose it with `registry.use("fla")`.

`decode` has several launches, like a model without a fused decode step: the update of the convolution, fla's recurrent
rule with the gates inside, and fla's gated norm. The update of the convolution comes from this project, because fla
keeps W inputs in the state, and this project keeps W - 1.
"""

import torch
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from hybrid_moe_kernels.causal_conv import update
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16)


def prefill(
    q_TMK: Tensor,
    k_TMK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    state_JHKV: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """Apply the gated delta rule to all tokens of several sequences, with flash-linear-attention.

    Same arguments and result as `reference.prefill`.
    """
    if v_THV.numel() == 0:
        return torch.empty_like(v_THV)
    o_1THV, state_BHKV = chunk_gated_delta_rule(
        *(x[None].contiguous() for x in (q_TMK, k_TMK, v_THV, g_TH, beta_TH)),
        initial_state=state_JHKV[slots_B],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=cu_seqlens_X,
    )
    state_JHKV[slots_B] = state_BHKV
    return o_1THV[0]


def decode(
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
) -> Tensor:
    """Apply Gated DeltaNet to one new token of each sequence, with flash-linear-attention.

    Same arguments and result as `reference.decode`, in several launches.
    """
    (B, H, V), M, K = z_BHV.shape, num_key_heads, state_JHKV.shape[2]
    if z_BHV.numel() == 0:
        return torch.empty_like(z_BHV)
    q, k, v = update(qkv_BC, conv_weight_CW, None, conv_JSC, slots_B).split([M * K, M * K, H * V], dim=-1)
    o_B1HV, state_BHKV = fused_recurrent_gated_delta_rule(
        q.reshape(B, 1, M, K),
        k.reshape(B, 1, M, K),
        v.reshape(B, 1, H, V),
        g=a_BH[:, None].contiguous(),
        beta=b_BH[:, None].contiguous(),
        initial_state=state_JHKV[slots_B],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log_H,
        dt_bias=dt_bias_H,
        use_beta_sigmoid_in_kernel=True,
    )
    state_JHKV[slots_B] = state_BHKV
    return rms_norm_gated(o_B1HV[:, 0], z_BHV.contiguous(), norm_weight_V, None, eps=eps)
