"""The Mamba-2 recurrence in plain torch: token by token, and in chunks.

For every head, with a state S [P, N] that starts at `state` (None: zeros), at each time t:

    S = exp(dt A) S + dt x b^T
    y = S c + D x

Shapes: B batch, T time, H heads, P head dim, G groups of heads that share b and c, N state size, Z chunks, C
tokens of a chunk. dt is positive, A negative. Arithmetic is in float32, or float64 for float64 inputs; y has
x's dtype, the state stays in the arithmetic's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _start(x_BTHP: Tensor, state_size: int, state_BHPN: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x_BTHP.dtype, torch.float32)
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

    sum_BHZC = a.cumsum(-1)
    causal_CC = torch.ones(C, C, dtype=torch.bool, device=x.device).tril()
    gap_BHZCC = sum_BHZC[..., :, None] - sum_BHZC[..., None, :]
    decay_BHZCC = gap_BHZCC.masked_fill(~causal_CC, -torch.inf).exp()
    y_BHZCP = ((c @ b.transpose(-1, -2)) * decay_BHZCC) @ written
    c_BHZCN = c * sum_BHZC.exp()[..., None]
    b_BHZCN = b * (sum_BHZC[..., -1:] - sum_BHZC).exp()[..., None]
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
