"""The gated delta rule in plain torch: token by token, and in chunks.

For every head, with a state S [K, V] that starts at `state` (None: zeros), at each time t:

    S = exp(g) S                      decay
    d = beta (v - S^T k)              what the memory lacks of v
    S = S + k d^T                     write
    o = S^T q                         read

`prefill` and `decode` have the ops' signatures. Below them, for sequences of one length, q and k come already
normalised and scaled, one of each for every value head, and states are handed in and out.

Shapes: B sequences, T time (of all sequences, one after another, in `prefill`), M key heads, H value heads, K key dim,
V value dim, N chunks, C tokens of a chunk (in `decode` the channels 2 M K + H V), W filter width, S = W - 1, J slots of
the pools, X = B + 1. Arithmetic is in float32, or float64 for float64 inputs; the output has v's dtype, the state stays
in the arithmetic's.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import update
from hybrid_moe_kernels.norm.reference import norm_then_gate
from hybrid_moe_kernels.precision import narrow, wide, widen
from hybrid_moe_kernels.sequences import by_length, load, store, sums_between
from torch import Tensor


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
    """o [T, H, V]; sequence b starts from state[slots[b]] and leaves its last state there.

    q and k as the convolution gives them: they are brought to length 1 (over K, eps 1e-6), and q is scaled by K^-0.5.
    g is the logarithm of the decay, beta how much of the correction is written.
    """
    q_TMK, k_TMK = _unit(q_TMK) * q_TMK.shape[-1] ** -0.5, _unit(k_TMK)
    repeats = v_THV.shape[1] // q_TMK.shape[1]
    inputs = (q_TMK.repeat_interleave(repeats, 1), k_TMK.repeat_interleave(repeats, 1), v_THV, g_TH, beta_TH)
    o_THV = torch.empty(v_THV.shape, dtype=v_THV.dtype, device=v_THV.device)
    for sequences, rows, length in by_length(cu_seqlens_X):
        rule = recurrent_gated_delta_rule if length == 1 else chunk_gated_delta_rule
        slots = slots_B[sequences]
        q, k, v, g, beta = (x[rows].unflatten(0, (-1, length)) for x in inputs)
        o_BTHV, state_BHKV = rule(q, k, v, g, beta, load(state_JHKV, slots))
        o_THV[rows] = o_BTHV.flatten(0, 1)
        store(state_JHKV, slots, state_BHKV)
    return o_THV


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
    """One token of each sequence: convolution, gates, the rule, and the gated norm; y [B, H, V].

    qkv, z, b and a come from the input projections: beta = sigmoid(b), g = -exp(A_log) softplus(a + dt_bias).
    """
    (H, V), M, K = z_BHV.shape[1:], num_key_heads, state_JHKV.shape[2]
    qkv_BC = update(qkv_BC, conv_weight_CW, None, conv_JSC, slots_B)
    qk_BNK, v_BHV = qkv_BC[:, : 2 * M * K].view(-1, 2 * M, K), qkv_BC[:, 2 * M * K :].view(-1, H, V)
    q_BHK, k_BHK = _unit(qk_BNK).repeat_interleave(H // M, 1).chunk(2, dim=1)
    beta_BH, g_BH = gates(b_BH, a_BH, A_log_H, dt_bias_H)
    state_BHKV = load(state_JHKV, slots_B)
    o_BHV = _write_and_read(state_BHKV, q_BHK * K**-0.5, k_BHK, widen(v_BHV), g_BH, beta_BH)
    store(state_JHKV, slots_B, state_BHKV)
    return norm_then_gate(narrow(o_BHV, qkv_BC.dtype), z_BHV, norm_weight_V, eps)


def gates(b__H: Tensor, a__H: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the correction is written, and the logarithm of the decay."""
    dt__H = F.softplus(widen(a__H) + widen(dt_bias_H))
    return widen(b__H).sigmoid(), -widen(A_log_H).exp() * dt__H


def _unit(x: Tensor) -> Tensor:
    """x / |x| in float32 or wider."""
    x = widen(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _start(v_BTHV: Tensor, num_keys: int, state_BHKV: Tensor | None) -> Tensor:
    if state_BHKV is not None:
        return state_BHKV.to(wide(v_BTHV.dtype))
    B, _, H, V = v_BTHV.shape
    return torch.zeros(B, H, num_keys, V, dtype=wide(v_BTHV.dtype), device=v_BTHV.device)


def recurrent_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after another; the definition. Returns o [B, T, H, V] and the final state [B, H, K, V]."""
    S_BHKV = _start(v_BTHV, k_BTHK.shape[-1], state_BHKV).clone(memory_format=torch.contiguous_format)
    inputs = [x.to(S_BHKV.dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)]
    o_BTHV = torch.empty_like(inputs[2])
    for t in range(o_BTHV.shape[1]):
        o_BTHV[:, t] = _write_and_read(S_BHKV, *(x[:, t] for x in inputs))
    return o_BTHV.to(v_BTHV.dtype), S_BHKV


def _write_and_read(
    S_BHKV: Tensor, q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor
) -> Tensor:
    """One token, all of one dtype: o [B, H, V]; the state changes in place. All heads are one batch, P = B H."""
    (B, H, K, V), decay_P11 = S_BHKV.shape, g_BH.exp().view(-1, 1, 1)
    S_PKV, k_P1K, v_P1V = S_BHKV.view(-1, K, V), k_BHK.reshape(-1, 1, K), v_BHV.reshape(-1, 1, V)
    S_PKV.mul_(decay_P11)
    d_P1V = torch.baddbmm(v_P1V, k_P1K, S_PKV, alpha=-1).mul_(beta_BH.reshape(-1, 1, 1))
    S_PKV.baddbmm_(k_P1K.mT, d_P1V)
    return torch.bmm(q_BHK.reshape(-1, 1, K), S_PKV).view(B, H, V)


def chunk_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    chunk_size: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same map, a chunk at a time.

    Let G be the running sum of g inside a chunk and S the state before it. Unrolling the recurrence gives

        d_t = beta_t (v_t - e^{G_t} S^T k_t - sum_{s<t} e^{G_t-G_s} (k_t . k_s) d_s)

    which is a unit lower triangular system (I + L) D = beta V - (beta e^G K) S. (I + L)^-1 does not depend on S, so
    it is computed for all chunks at once; only small products are sequential.
    """
    S_BHKV = _start(v_BTHV, k_BTHK.shape[-1], state_BHKV)
    T, C = v_BTHV.shape[1], min(chunk_size, v_BTHV.shape[1])
    q, k, v, g, beta = (_chunks(x.to(S_BHKV.dtype), C) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))

    G_BHNC, gap_BHNCC = g.cumsum(-1), sums_between(g)
    causal_CC = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()
    decay_BHNCC = gap_BHNCC.masked_fill(~causal_CC, -torch.inf).exp()
    L_BHNCC = (beta[..., None] * (k @ k.transpose(-1, -2)) * decay_BHNCC).tril(-1)
    eye_CC = torch.eye(C, dtype=L_BHNCC.dtype, device=v.device)
    inverse_BHNCC = torch.linalg.solve_triangular(L_BHNCC, eye_CC, upper=False, unitriangular=True)
    inverse_BHNCC = inverse_BHNCC * beta[..., None, :]
    from_value, from_state = inverse_BHNCC @ v, inverse_BHNCC @ (k * G_BHNC.exp()[..., None])

    reads_BHNCC = (q @ k.transpose(-1, -2)) * decay_BHNCC
    q_BHNCK = q * G_BHNC.exp()[..., None]
    k_BHNCK = k * gap_BHNCC[..., -1, :].exp()[..., None]
    through_BHN = G_BHNC[..., -1].exp()
    o_BHNCV = torch.empty_like(v)
    for n in range(v.shape[2]):
        d_BHCV = from_value[:, :, n] - from_state[:, :, n] @ S_BHKV
        o_BHNCV[:, :, n] = q_BHNCK[:, :, n] @ S_BHKV + reads_BHNCC[:, :, n] @ d_BHCV
        S_BHKV = S_BHKV * through_BHN[:, :, n, None, None] + k_BHNCK[:, :, n].transpose(-1, -2) @ d_BHCV
    return o_BHNCV.flatten(2, 3)[:, :, :T].transpose(1, 2).to(v_BTHV.dtype), S_BHKV


def _chunks(x_BTH_: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] -> [B, H, N, C, ...], the last chunk padded with zeros: no decay, no write."""
    pad = -x_BTH_.shape[1] % chunk
    tail = (0, 0) * (x_BTH_.dim() - 2)
    return F.pad(x_BTH_, (*tail, 0, pad)).unflatten(1, (-1, chunk)).movedim(3, 1).contiguous()
