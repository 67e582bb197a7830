"""The gated delta rule in plain torch: token by token, and in chunks.

For every head, with a state S [K, V] that starts at `state` (or at zeros, if no state is given), at each time t:

    S = exp(g) S                      decay
    d = beta (v - S^T k)              the correction: v minus what the memory returns for k
    S = S + k d^T                     write
    o = S^T q                         read

`prefill` and `decode` implement the operations, with states in slots. The functions below them take sequences of one
length, with q and k already normalised, scaled and repeated for every value head. They take and return the states.

Shapes: B sequences, T tokens (in `prefill`, of all sequences, one after another), M key heads, H value heads, K key
dim, V value dim, Z chunks, C tokens of a chunk (in `decode`, the 2 M K + H V channels), W filter width, S = W - 1
inputs in a state of the convolution, J slots (each holds the state of one sequence), X = B + 1 bounds (sequence b is
between bounds b and b + 1). All is computed in float32, or in float64 for float64 inputs. The states keep this dtype,
and the output is cast to the dtype of v.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import update
from hybrid_moe_kernels.norm.reference import norm_then_gate
from hybrid_moe_kernels.precision import narrow, wide, widen
from hybrid_moe_kernels.sequences import Chunks, differentiable, load, store, sums_between
from torch import Tensor

CHUNK = 32
"""Tokens of a chunk."""


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
    """Process all tokens of several sequences. Return o [T, H, V].

    Sequence b starts from state[slots[b]] and stores its last state there.

    q, k     outputs of the convolution; they are normalised to length 1 (over K, eps 1e-6), and q is scaled by K^-0.5
    g        logarithm of the decay
    beta     share of the correction that is written, 0 to 1
    """
    q_TMK, k_TMK = _unit(q_TMK) * q_TMK.shape[-1] ** -0.5, _unit(k_TMK)
    repeats = v_THV.shape[1] // q_TMK.shape[1]
    inputs = (q_TMK.repeat_interleave(repeats, 1), k_TMK.repeat_interleave(repeats, 1), v_THV, g_TH, beta_TH)
    chunks = Chunks.of(cu_seqlens_X, CHUNK)
    slots = slots_B[chunks.order]
    o_THV, state_BHKV = _by_chunks(*inputs, load(state_JHKV, slots, copy=differentiable(*inputs)), chunks)
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
    """Process one token of each sequence: convolution, gates, the rule, and the gated norm. Return y [B, H, V].

    qkv, z, b and a are outputs of the input projections: beta = sigmoid(b), g = -exp(A_log) softplus(a + dt_bias).
    """
    (H, V), M, K = z_BHV.shape[1:], num_key_heads, state_JHKV.shape[2]
    qkv_BC = update(qkv_BC, conv_weight_CW, None, conv_JSC, slots_B)
    qk_BNK, v_BHV = qkv_BC[:, : 2 * M * K].view(-1, 2 * M, K), qkv_BC[:, 2 * M * K :].view(-1, H, V)
    q_BHK, k_BHK = _unit(qk_BNK).repeat_interleave(H // M, 1).chunk(2, dim=1)
    beta_BH, g_BH = gates(b_BH, a_BH, A_log_H, dt_bias_H)
    in_place = not differentiable(qkv_BC, g_BH, beta_BH)
    state_BHKV = load(state_JHKV, slots_B, copy=not in_place)
    inputs = q_BHK * K**-0.5, k_BHK, widen(v_BHV), g_BH, beta_BH
    o_BHV, state_BHKV = _write_and_read(state_BHKV, *inputs, in_place=in_place)
    store(state_JHKV, slots_B, state_BHKV)
    return norm_then_gate(narrow(o_BHV, qkv_BC.dtype), z_BHV, norm_weight_V, eps)


def gates(b__H: Tensor, a__H: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return beta, the share of the correction that is written, and g, the logarithm of the decay."""
    dt__H = F.softplus(widen(a__H) + widen(dt_bias_H))
    return widen(b__H).sigmoid(), -widen(A_log_H).exp() * dt__H


def _unit(x: Tensor) -> Tensor:
    """Return x / |x| in float32, or in float64 if x is float64."""
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
    """Apply the gated delta rule token by token. Return o [B, T, H, V] and the final state [B, H, K, V]."""
    S_BHKV, outputs = _start(v_BTHV, k_BTHK.shape[-1], state_BHKV).contiguous(), []
    inputs = [x.to(S_BHKV.dtype) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH)]
    for t in range(v_BTHV.shape[1]):
        o_BHV, S_BHKV = _write_and_read(S_BHKV, *(x[:, t] for x in inputs))
        outputs.append(o_BHV)
    return torch.stack(outputs, 1).to(v_BTHV.dtype), S_BHKV


def _write_and_read(
    S_BHKV: Tensor,
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g_BH: Tensor,
    beta_BH: Tensor,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """Process one token of each sequence: write to the state, then read. Return o [B, H, V] and the new state.

    All arguments have the same dtype. in_place: overwrite the given state. Shapes: P = B H, the heads of all sequences.
    """
    (B, H, K, V), decay_P11 = S_BHKV.shape, g_BH.exp().view(-1, 1, 1)
    S_PKV, k_P1K, v_P1V = S_BHKV.view(-1, K, V), k_BHK.reshape(-1, 1, K), v_BHV.reshape(-1, 1, V)
    out = S_PKV if in_place else None
    S_PKV = torch.mul(S_PKV, decay_P11, out=out)
    d_P1V = torch.baddbmm(v_P1V, k_P1K, S_PKV, alpha=-1) * beta_BH.reshape(-1, 1, 1)
    S_PKV = torch.baddbmm(S_PKV, k_P1K.mT, d_P1V, out=out)
    return torch.bmm(q_BHK.reshape(-1, 1, K), S_PKV).view(B, H, V), S_PKV.view(B, H, K, V)


def chunk_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Apply the gated delta rule to one chunk of tokens at a time. Same result as `recurrent_gated_delta_rule`."""
    (B, T, _, _), S_BHKV = v_BTHV.shape, _start(v_BTHV, k_BTHK.shape[-1], state_BHKV)
    chunks = Chunks.of(T * torch.arange(B + 1, device=S_BHKV.device), chunk_size)
    q_THK, k_THK, v_THV, g_TH, beta_TH = (x.flatten(0, 1) for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    o_THV, S_BHKV = _by_chunks(q_THK, k_THK, v_THV, g_TH, beta_TH, S_BHKV, chunks)
    return o_THV.view(v_BTHV.shape), S_BHKV


def _by_chunks(
    q_THK: Tensor, k_THK: Tensor, v_THV: Tensor, g_TH: Tensor, beta_TH: Tensor, S_BHKV: Tensor, chunks: Chunks
) -> tuple[Tensor, Tensor]:
    """Return o [T, H, V] and the last states. Given and returned states are in the order of `chunks.order`.

    Let G be the running sum of g inside a chunk, and S the state before the chunk. Unrolling the recurrence gives

        d_t = beta_t (v_t - e^{G_t} S^T k_t - sum_{s<t} e^{G_t-G_s} (k_t . k_s) d_s)

    which is a unit lower triangular system (I + L) D = beta V - (beta e^G K) S. (I + L)^-1 does not depend on S, so
    it is computed for all chunks at once. Only small products are computed chunk after chunk. Rows that pad a chunk
    change no state.
    """
    inputs = (x.to(S_BHKV.dtype) for x in (q_THK, k_THK, v_THV, g_TH, beta_TH))
    q, k, v, g, beta = (chunks.cut(x).transpose(1, 2).contiguous() for x in inputs)

    G_ZHC, gap_ZHCC = g.cumsum(-1), sums_between(g)
    causal_CC = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=v.device).tril()
    decay_ZHCC = gap_ZHCC.masked_fill(~causal_CC, -torch.inf).exp()
    L_ZHCC = (beta[..., None] * (k @ k.mT) * decay_ZHCC).tril(-1)
    eye_CC = torch.eye(chunks.size, dtype=L_ZHCC.dtype, device=v.device)
    inverse_ZHCC = torch.linalg.solve_triangular(L_ZHCC, eye_CC, upper=False, unitriangular=True)
    inverse_ZHCC = inverse_ZHCC * beta[..., None, :]
    from_value, from_state = inverse_ZHCC @ v, inverse_ZHCC @ (k * G_ZHC.exp()[..., None])

    reads_ZHCC = (q @ k.mT) * decay_ZHCC
    q_ZHCK = q * G_ZHC.exp()[..., None]
    k_ZHCK = k * gap_ZHCC[..., -1, :].exp()[..., None]
    through_ZH11 = G_ZHC[..., -1].exp()[..., None, None]
    first, outputs, ended = 0, [v[:0]], []
    for count in chunks.counts:
        now = slice(first, first + count)
        ended.append(S_BHKV[count:])
        S_BHKV = S_BHKV[:count]
        d_BHCV = from_value[now] - from_state[now] @ S_BHKV
        outputs.append(q_ZHCK[now] @ S_BHKV + reads_ZHCC[now] @ d_BHCV)
        S_BHKV = S_BHKV * through_ZH11[now] + k_ZHCK[now].mT @ d_BHCV
        first += count
    o_ZCHV = torch.cat(outputs).transpose(1, 2)
    return chunks.join(o_ZCHV).to(v_THV.dtype), torch.cat([S_BHKV, *reversed(ended)])
