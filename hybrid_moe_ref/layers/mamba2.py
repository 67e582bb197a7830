"""Mamba-2: a linear recurrence with one decay per head.

Shapes: B sequences, T tokens, H hidden, N heads, P head dim, G groups, S state size, C conv channels.
"""

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import causal_conv
from hybrid_moe_kernels.ssd.reference import chunk_ssd, recurrent_ssd
from torch import Tensor, nn

from hybrid_moe_ref.batch import Group
from hybrid_moe_ref.cache import StatePast
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.mixer import Mixer
from hybrid_moe_ref.layers.norm import GateThenNorm


class Mamba2(Mixer):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.num_groups, self.state_size = config.mamba_num_groups, config.mamba_state_size
        self.time_step_limit = (config.mamba_time_step_min, config.mamba_time_step_max)
        inner = self.num_heads * self.head_dim
        channels = inner + 2 * self.num_groups * self.state_size
        self.in_proj = nn.Linear(config.hidden_size, inner + channels + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(
            channels,
            channels,
            config.mamba_conv_kernel_dim,
            groups=channels,
            bias=config.mamba_conv_bias,
        )
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GateThenNorm(inner, self.num_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def mix(self, x_BTH: Tensor, group: Group, past: StatePast | None) -> Tensor:
        conv, state = past.load() if past else (None, None)
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_size
        z, xbc_BTC, dt_BTN = self.in_proj(x_BTH).split([inner, inner + 2 * shared, self.num_heads], dim=-1)
        xbc_BTC, conv = causal_conv(xbc_BTC, self.conv1d.weight[:, 0], self.conv1d.bias, conv)
        x, b, c = xbc_BTC.split([inner, shared, shared], dim=-1)
        wide = torch.promote_types(x_BTH.dtype, torch.float32)
        dt_BTN = F.softplus(dt_BTN.to(wide) + self.dt_bias.to(wide)).clamp(*self.time_step_limit)
        scan = recurrent_ssd if group.length == 1 else chunk_ssd
        y_BTNP, state = scan(
            x.unflatten(-1, (-1, self.head_dim)),
            dt_BTN,
            -self.A_log.to(wide).exp(),
            b.unflatten(-1, (-1, self.state_size)),
            c.unflatten(-1, (-1, self.state_size)),
            self.D,
            state,
        )
        if past:
            past.store(conv, state)
        return self.out_proj(self.norm(y_BTNP.flatten(-2), z))
