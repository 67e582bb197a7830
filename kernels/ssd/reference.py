"""The Mamba-2 recurrence in plain torch: token by token, and in chunks.

For every head, with a state S [P, N] that starts at `state` (or at zeros, if no state is given), at each time t:

    S = exp(dt A) S + dt x b^T
    y = S c + D x

`prefill` and `decode` implement the operations, with states in slots. The functions below them take sequences of one
length. They take and return the states.

Shapes: B sequences, T tokens (in `prefill`, of all sequences, one after another), H heads, P head dim, G groups of
heads that share b and c, N state size, I = H P dims of all heads, Z chunks, C tokens of a chunk (in `decode`, the
I + 2 G N channels), W filter width, S = W - 1 inputs in a state of the convolution, J slots (each holds the state of
one sequence), X = B + 1 bounds (sequence b is between bounds b and b + 1). dt is positive, and A is negative. All is
computed in float32, or in float64 for float64 inputs. The states keep this dtype, and y is cast to the dtype of x.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import update
from hybrid_moe_kernels.norm.reference import gate_then_norm
from hybrid_moe_kernels.precision import wide, widen
from hybrid_moe_kernels.sequences import Chunks, differentiable, load, store, sums_between
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk."""


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
    """Process all tokens of several sequences. Return y [T, H, P].

    Sequence s starts from state[slots[s]] and stores its last state there.
    """
    chunks = Chunks.of(cu_seqlens_X, CHUNK)
    slots = slots_B[chunks.order]
    copy = differentiable(x_THP, dt_TH, A_H, b_TGN, c_TGN)
    y_THP, state_BHPN = _by_chunks(x_THP, dt_TH, A_H, b_TGN, c_TGN, D_H, load(state_JHPN, slots, copy=copy), chunks)
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
    """Process one token of each sequence: convolution, time step, recurrence, and the gated norm. Return y [B, I].

    xbc, z and dt are outputs of the input projection. The time step is clamp(softplus(dt + dt_bias), *dt_limit), and
    the decay rate -exp(A_log). Sequence b uses the row slots[b] of conv and state, which are updated in place. If
    norm_weight is None, the caller applies the gate and the norm.
    """
    (H, P, N), G = state_JHPN.shape[1:], num_groups
    xbc_BC = update(xbc_BC, conv_weight_CW, conv_bias_C, conv_JSC, slots_B)
    x, b, c = xbc_BC.split([H * P, G * N, G * N], dim=-1)
    x, b, c = x.unflatten(-1, (H, P)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
    dt_BH, A_H = time_step(dt_BH, dt_bias_H, dt_limit), decay_rate(A_log_H)
    state_BHPN = load(state_JHPN, slots_B, copy=differentiable(xbc_BC, dt_BH, A_H))
    y_B1HP, state_BHPN = recurrent_ssd(x[:, None], dt_BH[:, None], A_H, b[:, None], c[:, None], D_H, state_BHPN)
    store(state_JHPN, slots_B, state_BHPN)
    y_BI = y_B1HP[:, 0].flatten(-2)
    return y_BI if norm_weight_I is None else gate_then_norm(y_BI, z_BI, norm_weight_I, G, eps)


def time_step(dt__H: Tensor, dt_bias_H: Tensor, limit: tuple[float, float | None]) -> Tensor:
    """Return the time step softplus(dt + dt_bias), clamped to `limit`: (smallest, largest or None for no limit)."""
    return F.softplus(widen(dt__H) + widen(dt_bias_H)).clamp(*limit)


def decay_rate(A_log_H: Tensor) -> Tensor:
    """Return A = -exp(A_log), which is negative."""
    return -widen(A_log_H).exp()


def _start(x_BTHP: Tensor, state_size: int, state_BHPN: Tensor | None) -> Tensor:
    dtype = wide(x_BTHP.dtype)
    if state_BHPN is not None:
        return state_BHPN.to(dtype)
    B, _, H, P = x_BTHP.shape
    return torch.zeros(B, H, P, state_size, dtype=dtype, device=x_BTHP.device)


def _per_head(bc__GN: Tensor, num_heads: int) -> Tensor:
    return bc__GN.repeat_interleave(num_heads // bc__GN.shape[-2], dim=-2)


def recurrent_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Apply the Mamba-2 recurrence token by token. Return y [B, T, H, P] and the final state [B, H, P, N]."""
    S_BHPN = _start(x_BTHP, b_BTGN.shape[-1], state_BHPN)
    x, dt, A, b, c, D = (z.to(S_BHPN.dtype) for z in (x_BTHP, dt_BTH, A_H, b_BTGN, c_BTGN, D_H))
    b, c = _per_head(b, x.shape[2]), _per_head(c, x.shape[2])
    outputs = []
    for t in range(x.shape[1]):
        decay_BH = (dt[:, t] * A).exp()
        write_BHPN = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        S_BHPN = S_BHPN * decay_BH[..., None, None] + write_BHPN
        outputs.append(torch.einsum("bhpn,bhn->bhp", S_BHPN, c[:, t]))
    return (torch.stack(outputs, 1) + D[:, None] * x).to(x_BTHP.dtype), S_BHPN


def chunk_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Apply the Mamba-2 recurrence to one chunk of tokens at a time. Same result as `recurrent_ssd`."""
    (B, T, _, _), S_BHPN = x_BTHP.shape, _start(x_BTHP, b_BTGN.shape[-1], state_BHPN)
    chunks = Chunks.of(T * torch.arange(B + 1, device=S_BHPN.device), chunk_size)
    x_THP, dt_TH, b_TGN, c_TGN = (z.flatten(0, 1) for z in (x_BTHP, dt_BTH, b_BTGN, c_BTGN))
    y_THP, S_BHPN = _by_chunks(x_THP, dt_TH, A_H, b_TGN, c_TGN, D_H, S_BHPN, chunks)
    return y_THP.view(x_BTHP.shape), S_BHPN


def _by_chunks(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    b_TGN: Tensor,
    c_TGN: Tensor,
    D_H: Tensor,
    S_BHPN: Tensor,
    chunks: Chunks,
) -> tuple[Tensor, Tensor]:
    """Return y [T, H, P] and the last states. Given and returned states are in the order of `chunks.order`.

    Inside a chunk this is masked attention, computed for all chunks at once. Only the states are computed chunk after
    chunk. Rows that pad a chunk change no state.
    """
    x, dt, A, b, c, D = (z.to(S_BHPN.dtype) for z in (x_THP, dt_TH, A_H, b_TGN, c_TGN, D_H))
    rows = x * dt[..., None], dt * A, _per_head(b, x.shape[1]), _per_head(c, x.shape[1])
    written, a, b, c = (chunks.cut(z).transpose(1, 2).contiguous() for z in rows)

    sum_ZHC, gap_ZHCC = a.cumsum(-1), sums_between(a)
    causal_CC = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=x.device).tril()
    decay_ZHCC = gap_ZHCC.masked_fill(~causal_CC, -torch.inf).exp()
    y_ZHCP = ((c @ b.mT) * decay_ZHCC) @ written
    c_ZHCN = c * sum_ZHC.exp()[..., None]
    b_ZHCN = b * gap_ZHCC[..., -1, :].exp()[..., None]
    added_ZHPN = written.mT @ b_ZHCN
    through_ZH11 = sum_ZHC[..., -1].exp()[..., None, None]
    first, outputs, ended = 0, [y_ZHCP[:0]], []
    for count in chunks.counts:
        now = slice(first, first + count)
        ended.append(S_BHPN[count:])
        S_BHPN = S_BHPN[:count]
        outputs.append(y_ZHCP[now] + c_ZHCN[now] @ S_BHPN.mT)
        S_BHPN = S_BHPN * through_ZH11[now] + added_ZHPN[now]
        first += count
    y_THP = chunks.join(torch.cat(outputs).transpose(1, 2))
    return (y_THP + D[:, None] * x).to(x_THP.dtype), torch.cat([S_BHPN, *reversed(ended)])
