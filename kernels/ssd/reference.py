"""The Mamba-2 recurrence in plain torch: token by token, and in chunks.

For every head, with a state S [P, N] that starts at `state` (None: zeros), at each time t:

    S = exp(dt A) S + dt x b^T
    y = S c + D x

`prefill` and `decode` have the ops' signatures; below them, sequences have one length, and states are handed in and
out.

Shapes: B sequences, T time (of all sequences, one after another, in `prefill`), H heads, P head dim, G groups of heads
that share b and c, N state size, I = H P, Z chunks, C tokens of a chunk (in `decode` the channels I + 2 G N), W filter
width, S = W - 1, J slots of the pools, X = B + 1. dt is positive, A negative. Arithmetic is in float32, or float64 for
float64 inputs; y has x's dtype, the state stays in the arithmetic's.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import update
from hybrid_moe_kernels.norm.reference import gate_then_norm
from hybrid_moe_kernels.precision import wide, widen
from hybrid_moe_kernels.sequences import by_length, load, store, sums_between
from torch import Tensor


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
    """y [T, H, P]; sequence s starts from state[slots[s]] and leaves its last state there."""
    y_THP = torch.empty(x_THP.shape, dtype=x_THP.dtype, device=x_THP.device)
    for sequences, rows, length in by_length(cu_seqlens_X):
        scan = recurrent_ssd if length == 1 else chunk_ssd
        slots = slots_B[sequences]
        x, dt, b, c = (z[rows].unflatten(0, (-1, length)) for z in (x_THP, dt_TH, b_TGN, c_TGN))
        y_BTHP, state_BHPN = scan(x, dt, A_H, b, c, D_H, load(state_JHPN, slots))
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
    """One token of each sequence: convolution, time step, recurrence, and the gated norm; y [B, I].

    xbc, z and dt come from the input projection: dt = clamp(softplus(dt + dt_bias), *dt_limit), A = -exp(A_log).
    norm_weight None leaves gate and norm to the caller.
    """
    (H, P, N), G = state_JHPN.shape[1:], num_groups
    xbc_BC = update(xbc_BC, conv_weight_CW, conv_bias_C, conv_JSC, slots_B)
    x, b, c = xbc_BC.split([H * P, G * N, G * N], dim=-1)
    x, b, c = x.unflatten(-1, (H, P)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
    dt_BH, A_H = time_step(dt_BH, dt_bias_H, dt_limit), decay_rate(A_log_H)
    state_BHPN = load(state_JHPN, slots_B)
    y_B1HP, state_BHPN = recurrent_ssd(x[:, None], dt_BH[:, None], A_H, b[:, None], c[:, None], D_H, state_BHPN)
    store(state_JHPN, slots_B, state_BHPN)
    y_BI = y_B1HP[:, 0].flatten(-2)
    return y_BI if norm_weight_I is None else gate_then_norm(y_BI, z_BI, norm_weight_I, G, eps)


def time_step(dt__H: Tensor, dt_bias_H: Tensor, limit: tuple[float, float | None]) -> Tensor:
    """softplus(dt + dt_bias), clamped."""
    return F.softplus(widen(dt__H) + widen(dt_bias_H)).clamp(*limit)


def decay_rate(A_log_H: Tensor) -> Tensor:
    """A < 0."""
    return -widen(A_log_H).exp()


def _start(x_BTHP: Tensor, state_size: int, state_BHPN: Tensor | None) -> Tensor:
    dtype = wide(x_BTHP.dtype)
    if state_BHPN is not None:
        return state_BHPN.to(dtype)
    B, _, H, P = x_BTHP.shape
    return torch.zeros(B, H, P, state_size, dtype=dtype, device=x_BTHP.device)


def _per_head(bc_BTGN: Tensor, num_heads: int) -> Tensor:
    return bc_BTGN.repeat_interleave(num_heads // bc_BTGN.shape[2], dim=2)


def recurrent_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another; the definition. Returns y [B, T, H, P] and the final state [B, H, P, N]."""
    S_BHPN = _start(x_BTHP, b_BTGN.shape[-1], state_BHPN)
    x, dt, A, b, c, D = (z.to(S_BHPN.dtype) for z in (x_BTHP, dt_BTH, A_H, b_BTGN, c_BTGN, D_H))
    b, c = _per_head(b, x.shape[2]), _per_head(c, x.shape[2])
    y_BTHP = torch.empty_like(x)
    for t in range(x.shape[1]):
        decay_BH = (dt[:, t] * A).exp()
        write_BHPN = (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        S_BHPN = S_BHPN * decay_BH[..., None, None] + write_BHPN
        y_BTHP[:, t] = torch.einsum("bhpn,bhn->bhp", S_BHPN, c[:, t])
    return (y_BTHP + D[:, None] * x).to(x_BTHP.dtype), S_BHPN


def chunk_ssd(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same map, a chunk at a time: masked attention inside a chunk, the recurrence only between
    chunks."""
    S_BHPN = _start(x_BTHP, b_BTGN.shape[-1], state_BHPN)
    T, H, C = x_BTHP.shape[1], x_BTHP.shape[2], min(chunk_size, x_BTHP.shape[1])
    x, dt, A, b, c, D = (z.to(S_BHPN.dtype) for z in (x_BTHP, dt_BTH, A_H, b_BTGN, c_BTGN, D_H))
    written, a = _chunks(x * dt[..., None], C), _chunks(dt * A, C)
    b, c = _chunks(_per_head(b, H), C), _chunks(_per_head(c, H), C)

    sum_BHZC, gap_BHZCC = a.cumsum(-1), sums_between(a)
    causal_CC = torch.ones(C, C, dtype=torch.bool, device=x.device).tril()
    decay_BHZCC = gap_BHZCC.masked_fill(~causal_CC, -torch.inf).exp()
    y_BHZCP = ((c @ b.transpose(-1, -2)) * decay_BHZCC) @ written
    c_BHZCN = c * sum_BHZC.exp()[..., None]
    b_BHZCN = b * gap_BHZCC[..., -1, :].exp()[..., None]
    added_BHZPN = written.transpose(-1, -2) @ b_BHZCN
    through_BHZ = sum_BHZC[..., -1].exp()
    for z in range(y_BHZCP.shape[2]):
        y_BHZCP[:, :, z] += c_BHZCN[:, :, z] @ S_BHPN.transpose(-1, -2)
        S_BHPN = S_BHPN * through_BHZ[:, :, z, None, None] + added_BHZPN[:, :, z]
    y_BTHP = y_BHZCP.flatten(2, 3)[:, :, :T].transpose(1, 2)
    return (y_BTHP + D[:, None] * x).to(x_BTHP.dtype), S_BHPN


def _chunks(x_BTH_: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, Z, C, ...], the last chunk padded with zeros: no decay, no write."""
    pad = -x_BTH_.shape[1] % chunk
    tail = (0, 0) * (x_BTH_.dim() - 2)
    return F.pad(x_BTH_, (*tail, 0, pad)).unflatten(1, (-1, chunk)).movedim(3, 1).contiguous()
