"""Gated DeltaNet: a linear recurrence that corrects its state.

Shapes: T rows of one part of the batch (see `Part`), H hidden, N value heads, M key heads, K key dim, V value dim, C
conv channels.
"""

import torch
from hybrid_moe_kernels import gated_delta_rule
from hybrid_moe_kernels.gated_delta_rule.reference import gates
from torch import Tensor, nn

from hybrid_moe_ref.batch import Part
from hybrid_moe_ref.cache.pasts import StatePast
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.conv import CausalConv
from hybrid_moe_ref.layers.linear import is_plain, project
from hybrid_moe_ref.layers.mixer import Mixer
from hybrid_moe_ref.layers.norm import NormThenGate


class GatedDeltaNet(Mixer):
    prefill_rule = staticmethod(gated_delta_rule.prefill)  # an engine may choose another backend

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
        self.conv1d = CausalConv(channels, config.linear_conv_kernel_dim, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_value_heads))
        self.norm = NormThenGate(self.value_dim, config.rms_norm_eps)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def mix(self, x_TH: Tensor, part: Part, pasts: list[StatePast]) -> Tensor:
        past = StatePast.joined(pasts) if pasts else self._zero_states(x_TH, part)
        projections = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        qkv_TC, z_TI, b_TN, a_TN = project(x_TH, *projections)
        z_TNV = z_TI.unflatten(-1, (self.num_value_heads, self.value_dim))
        # The decode kernel includes the convolution and the norm. If one of them has a hook, it is called as a module
        # instead.
        is_one_call = part.is_decode and is_plain(self.conv1d, CausalConv) and is_plain(self.norm, NormThenGate)
        mixed = self._decode if is_one_call else self._prefill
        y_TNV = mixed(qkv_TC, z_TNV, b_TN, a_TN, part, past)
        (y_TH,) = project(y_TNV.flatten(-2), self.out_proj)
        return y_TH

    def _decode(self, qkv_TC: Tensor, z_TNV: Tensor, b_TN: Tensor, a_TN: Tensor, part: Part, past: StatePast) -> Tensor:
        return gated_delta_rule.decode(
            qkv_TC,
            z_TNV,
            b_TN,
            a_TN,
            self.conv1d.weight[:, 0],
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            past.conv_PWC,
            past.ssm_P___,
            past.slots_B,
            num_key_heads=self.num_key_heads,
            eps=self.norm.eps,
        )

    def _prefill(
        self, qkv_TC: Tensor, z_TNV: Tensor, b_TN: Tensor, a_TN: Tensor, part: Part, past: StatePast
    ) -> Tensor:
        qkv_TC = self.conv1d(qkv_TC, past, part)
        keys = self.num_key_heads * self.key_dim
        q, k, v = qkv_TC.split([keys, keys, self.num_value_heads * self.value_dim], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in ((q, self.key_dim), (k, self.key_dim), (v, self.value_dim)))
        beta_TN, g_TN = gates(b_TN, a_TN, self.A_log, self.dt_bias)
        o_TNV = self.prefill_rule(q, k, v, g_TN, beta_TN, past.ssm_P___, past.slots_B, part.cu_seqlens_X)
        return self.norm(o_TNV, z_TNV)

    def _zero_states(self, x_TH: Tensor, part: Part) -> StatePast:
        """Return zero states for sequences that are not cached."""
        channels, width = self.conv1d.weight.shape[0], self.conv1d.weight.shape[2]
        state = (self.num_value_heads, self.key_dim, self.value_dim)
        return StatePast.zeros(part.num_sequences, (width - 1, channels), state, x_TH)
