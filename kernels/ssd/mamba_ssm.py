"""The Mamba-2 recurrence of the package mamba_ssm, for comparison. Choose it with `registry.use("mamba_ssm")`.

`prefill` runs sequences of one length together, because mamba_ssm's kernel takes initial states only for a dense batch.
`decode` launches mamba_ssm's `selective_state_update` and several other kernels. `selective_state_update` also computes
the time step, unless `dt_limit` limits the time step.
"""

import torch
from hybrid_moe_kernels.causal_conv import update
from hybrid_moe_kernels.norm import gate_then_norm
from hybrid_moe_kernels.sequences import by_length, load, store
from hybrid_moe_kernels.ssd.reference import decay_rate, time_step
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor

DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16)


def prefill(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    D_H: Tensor,
    state_JHPN: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """Apply the Mamba-2 recurrence to all tokens of several sequences, with mamba_ssm.

    Same arguments and result as `reference.prefill`.
    """
    y_THP = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
    for sequences, rows, length in by_length(cu_seqlens_X):
        slots = slots_B[sequences]
        x, dt, b, c = (z[rows].unflatten(0, (-1, length)) for z in (x_THP, dt_TH, b_TGN, c_TGN))
        y_BTHP, state_BHPN = mamba_chunk_scan_combined(
            x, dt, A_H, b, c, chunk_size=256, D=D_H, initial_states=load(state_JHPN, slots), return_final_states=True
        )
        y_THP[rows] = y_BTHP.flatten(0, 1)
        store(state_JHPN, slots, state_BHPN)
    return y_THP


def decode(
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
) -> Tensor:
    """Apply Mamba-2 to one new token of each sequence, with mamba_ssm.

    Same arguments and result as `reference.decode`, in several launches.
    """
    (H, P, N), G = state_JHPN.shape[1:], num_groups
    if z_BI.numel() == 0:
        return torch.empty_like(z_BI)
    xbc_BC = update(xbc_BC, conv_weight_CW, conv_bias_C, conv_JSC, slots_B)
    x, b, c = xbc_BC.split([H * P, G * N, G * N], dim=-1)
    is_stock = dt_limit == (0.0, None)
    dt_BH = dt_BH if is_stock else time_step(dt_BH, dt_bias_H, dt_limit)
    # `dt_bias` cannot be None, because `selective_state_update` reads its stride
    dt_bias_H = dt_bias_H if is_stock else torch.zeros_like(dt_bias_H)
    y_BHP = selective_state_update(
        state_JHPN,
        x.unflatten(-1, (H, P)),
        dt_BH[..., None].expand(-1, -1, P),
        decay_rate(A_log_H)[:, None, None].expand(-1, P, N),
        b.unflatten(-1, (G, N)),
        c.unflatten(-1, (G, N)),
        D_H[:, None].expand(-1, P),
        dt_bias=dt_bias_H[:, None].expand(-1, P),
        dt_softplus=is_stock,
        state_batch_indices=slots_B.int(),
    )
    y_BI = y_BHP.flatten(-2)
    return y_BI if norm_weight_I is None else gate_then_norm(y_BI, z_BI, norm_weight_I, G, eps)
