"""Gated DeltaNet: a linear recurrence whose state is corrected, not only added to.

Shapes: B sequences, T tokens, H hidden, N value heads, M key heads, K key dim, V value dim, C conv channels.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import causal_conv
from hybrid_moe_kernels.gated_delta_rule.reference import chunk_gated_delta_rule, recurrent_gated_delta_rule
from torch import Tensor, nn

from hybrid_moe_ref.batch import Group
from hybrid_moe_ref.cache import StatePast
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.mixer import Mixer
from hybrid_moe_ref.layers.norm import NormThenGate


class GatedDeltaNet(Mixer):
    prefill_rule = staticmethod(chunk_gated_delta_rule)  # an engine puts another backend's here

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_key_heads, self.num_value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        keys, values = self.num_key_heads * self.key_dim, self.num_value_heads * self.value_dim
        channels = 2 * keys + values
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, self.num_value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, self.num_value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, config.linear_conv_kernel_dim, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.norm = NormThenGate(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def mix(self, x_BTH: Tensor, group: Group, past: StatePast | None) -> Tensor:
        conv, state = past.load() if past else (None, None)
        qkv_BTC, conv = causal_conv(self.in_proj_qkv(x_BTH), self.conv1d.weight[:, 0], None, conv)
        q_BTNK, k_BTNK, v_BTNV = self._heads(qkv_BTC)
        beta_BTN, g_BTN = self._gates(x_BTH)
        rule = recurrent_gated_delta_rule if group.length == 1 else self.prefill_rule
        o_BTNV, state = rule(q_BTNK, k_BTNK, v_BTNV, g_BTN, beta_BTN, state)
        if past:
            past.store(conv, state)
        z_BTNV = self.in_proj_z(x_BTH).unflatten(-1, (-1, self.value_dim))
        return self.out_proj(self.norm(o_BTNV, z_BTNV).flatten(-2))

    def _heads(self, qkv_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length q (scaled) and k, repeated to the value heads that share them, and v."""
        keys = self.num_key_heads * self.key_dim
        qk, v = qkv_BTC.split([2 * keys, self.num_value_heads * self.value_dim], dim=-1)
        qk_BTMK = _unit(qk.unflatten(-1, (-1, self.key_dim)))
        repeats = self.num_value_heads // self.num_key_heads
        q_BTNK, k_BTNK = qk_BTMK.repeat_interleave(repeats, dim=2).chunk(2, dim=2)
        return q_BTNK * self.key_dim**-0.5, k_BTNK, v.unflatten(-1, (-1, self.value_dim))

    def _gates(self, x_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the correction is written, and the logarithm of the decay."""
        wide = torch.promote_types(x_BTH.dtype, torch.float32)
        beta = self.in_proj_b(x_BTH).sigmoid()
        dt = F.softplus(self.in_proj_a(x_BTH).to(wide) + self.dt_bias.to(wide))
        return beta, -self.A_log.to(wide).exp() * dt


def _unit(x: Tensor) -> Tensor:
    """x / |x| in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
