"""Gated grouped-query attention: normalised q and k, partial rotary embedding, and an output gate from the
query projection.

Shapes: N rows of a group, B sequences, T new tokens, S tokens to attend to, H hidden, Q query heads, K KV heads, D head
dim.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels import attention, linear
from torch import Tensor, nn

from hybrid_moe_ref.batch import Group
from hybrid_moe_ref.cache import KVPast, KVRun
from hybrid_moe_ref.config import ModelConfig
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

    def mix(self, x_NH: Tensor, group: Group, past: KVPast | KVRun | None) -> Tensor:
        sequences, dim = (x_NH.shape[0] // group.length, group.length), self.head_dim
        weights = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        q_N_, k_N_, v_N_ = linear.project(x_NH, weights)
        q_BTQD, gate_BTQD = q_N_.view(*sequences, -1, 2 * dim).chunk(2, dim=-1)
        k_BTKD, v_BTKD = k_N_.view(*sequences, -1, dim), v_N_.view(*sequences, -1, dim)
        cos, sin = rotary_table(group.positions_BT, self.rotary_dim, self.rope_theta, x_NH.dtype)
        q_BTQD = rotate(self.q_norm(q_BTQD), cos, sin)
        k_BTKD = rotate(self.k_norm(k_BTKD), cos, sin)
        if past is not None and group.length == 1 and past.kv_PL2KD.dtype == x_NH.dtype:
            past.append(k_BTKD, v_BTKD)
            pages = past.kv_PL2KD, past.table_BP, past.lengths_B, past.length
            out_BTQD = attention.decode(q_BTQD[:, 0], *pages)[:, None]
        else:
            k_BSKD, v_BSKD = past.extend(k_BTKD, v_BTKD) if past else (k_BTKD, v_BTKD)
            out_BTQD = attend(q_BTQD, k_BSKD, v_BSKD, group)
        gated_N_ = (out_BTQD * gate_BTQD.sigmoid()).reshape(x_NH.shape[0], -1)
        (y_NH,) = linear.project(gated_N_, [self.o_proj.weight])
        return y_NH


def attend(q_BTQD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, group: Group) -> Tensor:
    """Softmax attention; the key in place s is visible to queries at position s and later."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTQD, k_BSKD, v_BSKD))
    T, S = q.shape[2], k.shape[2]
    if T == S:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    else:
        visible_B1TS = torch.arange(S, device=q.device) <= group.positions_BT[:, None, :, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_B1TS, enable_gqa=True)
    return out.transpose(1, 2)
