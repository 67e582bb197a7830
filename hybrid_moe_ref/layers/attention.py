"""Gated grouped-query attention, with normalised q and k, partial rotary embedding, and a gate on the output.

The query projection also computes the gate.

Shapes: T rows of one part of the batch (see `Part`), H hidden, Q query heads, K KV heads, D head dim, R half of the
rotary dim. In shapes that begin with BT or BS: B sequences with equally many new tokens, T new tokens of each sequence,
S tokens that they attend to.
"""

from itertools import zip_longest

import torch
import torch.nn.functional as F
from hybrid_moe_kernels import attention
from torch import Tensor, nn

from hybrid_moe_ref.batch import Group, Part
from hybrid_moe_ref.cache.pasts import KVPast, KVRun
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.linear import project
from hybrid_moe_ref.layers.mixer import Mixer
from hybrid_moe_ref.layers.norm import RMSNorm
from hybrid_moe_ref.layers.rope import rotary_table, rotate


class GatedAttention(Mixer):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = head_dim
        self.rotary_dim, self.rope_theta = config.rotary_dim, config.rope_theta
        self.q_proj = nn.Linear(hidden, self.num_heads * 2 * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def mix(self, x_TH: Tensor, part: Part, pasts: list[KVPast | KVRun]) -> Tensor:
        dim = self.head_dim
        q_T_, k_T_, v_T_ = project(x_TH, self.q_proj, self.k_proj, self.v_proj)
        q_TQD, gate_TQD = q_T_.unflatten(-1, (-1, 2 * dim)).chunk(2, dim=-1)
        k_TKD, v_TKD = k_T_.unflatten(-1, (-1, dim)), v_T_.unflatten(-1, (-1, dim))
        cos_TR, sin_TR = rotary_table(part, self.rotary_dim, self.rope_theta, x_TH.dtype)
        q_TQD = rotate(self.q_norm(q_TQD), cos_TR, sin_TR)
        k_TKD = rotate(self.k_norm(k_TKD), cos_TR, sin_TR)
        outputs, first = [], 0
        for group, past in zip_longest(part.groups, pasts):
            size = len(group.starts), group.length
            rows, first = slice(first, first + size[0] * size[1]), first + size[0] * size[1]
            q_BTQD, k_BTKD, v_BTKD = (x[rows].unflatten(0, size) for x in (q_TQD, k_TKD, v_TKD))
            outputs.append(_attend_group(q_BTQD, k_BTKD, v_BTKD, group, past).flatten(0, 1))
        out_TQD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        (y_TH,) = project((out_TQD * gate_TQD.sigmoid()).flatten(1), self.o_proj)
        return y_TH


def _attend_group(q_BTQD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, group: Group, past: KVPast | KVRun | None) -> Tensor:
    """Compute the attention of those sequences of the batch that have equally many new tokens (a `Group`).

    No gradient flows through a cache, because the cache gets detached keys and values.

    past: the cached keys and values of these sequences; None if they are not cached
    """
    if past is None:
        return attend(q_BTQD, k_BTKD, v_BTKD, group)
    is_differentiable = torch.is_grad_enabled() and q_BTQD.requires_grad
    if group.length == 1 and past.kv_PL2KD.dtype == q_BTQD.dtype and not is_differentiable:
        past.append(k_BTKD.detach(), v_BTKD.detach())
        pages = past.kv_PL2KD, past.table_BP, past.lengths_B, past.length
        out_BQD: Tensor = attention.decode(q_BTQD[:, 0], *pages)
        return out_BQD[:, None]
    k_BSKD, v_BSKD = past.extend(k_BTKD.detach(), v_BTKD.detach())
    if not any(group.starts):
        k_BSKD, v_BSKD = k_BTKD, v_BTKD
    elif is_differentiable:  # backward needs these values, and the next step overwrites the cache
        k_BSKD, v_BSKD = k_BSKD.clone(), v_BSKD.clone()
    return attend(q_BTQD, k_BSKD, v_BSKD, group)


def attend(q_BTQD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, group: Group) -> Tensor:
    """Compute causal softmax attention: a query at position p sees the keys 0 to p of its sequence.

    q_BTQD           queries [B sequences, T new tokens of each, Q query heads, D head dim]
    k_BSKD, v_BSKD   keys and values [B sequences, S earlier and new tokens, K KV heads, D head dim]
    group            these sequences, with the positions of the new tokens

    Returns [B, T, Q, D].
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BTQD, k_BSKD, v_BSKD))
    T, S = q.shape[2], k.shape[2]
    if T == S:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        visible_B1TS = torch.arange(S, device=q.device) <= group.positions_BT[:, None, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_B1TS, enable_gqa=True)
    return out.transpose(1, 2)
