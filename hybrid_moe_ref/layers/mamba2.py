"""Mamba-2: a linear recurrence with one decay per head.

Shapes: T rows of one part of the batch (see `Part`), N heads, P head dim, G groups, S state size, H hidden, I inner, C
conv channels.
"""

import torch
from hybrid_moe_kernels import ssd
from hybrid_moe_kernels.ssd.reference import decay_rate, time_step
from torch import Tensor, nn

from hybrid_moe_ref.batch import Part
from hybrid_moe_ref.cache.pasts import StatePast
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.conv import CausalConv
from hybrid_moe_ref.layers.linear import is_plain, project
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
        self.conv1d = CausalConv(channels, config.mamba_conv_kernel_dim, bias=config.mamba_conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.norm = GateThenNorm(inner, self.num_groups, config.rms_norm_eps)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def mix(self, x_TH: Tensor, part: Part, pasts: list[StatePast]) -> Tensor:
        past = StatePast.joined(pasts) if pasts else self._zero_states(x_TH, part)
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_size
        (projected_T_,) = project(x_TH, self.in_proj)
        z_TI, xbc_TC, dt_TN = projected_T_.split([inner, inner + 2 * shared, self.num_heads], dim=-1)
        # The decode kernel includes the convolution. If the convolution has a hook, it is called as a module instead.
        mixed = self._decode if part.is_decode and is_plain(self.conv1d, CausalConv) else self._prefill
        (y_TH,) = project(mixed(xbc_TC, z_TI, dt_TN, part, past), self.out_proj)
        return y_TH

    def _decode(self, xbc_TC: Tensor, z_TI: Tensor, dt_TN: Tensor, part: Part, past: StatePast) -> Tensor:
        # The decode kernel includes the norm. If the norm has a hook, it is called as a module instead.
        has_plain_norm = is_plain(self.norm, GateThenNorm)
        y_TI = ssd.decode(
            xbc_TC,
            z_TI,
            dt_TN,
            self.conv1d.weight[:, 0],
            self.conv1d.bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.norm.weight if has_plain_norm else None,
            past.conv_PWC,
            past.ssm_P___,
            past.slots_B,
            num_groups=self.num_groups,
            dt_limit=self.time_step_limit,
            eps=self.norm.eps,
        )
        return y_TI if has_plain_norm else self.norm(y_TI, z_TI)

    def _prefill(self, xbc_TC: Tensor, z_TI: Tensor, dt_TN: Tensor, part: Part, past: StatePast) -> Tensor:
        inner, shared = self.num_heads * self.head_dim, self.num_groups * self.state_size
        xbc_TC = self.conv1d(xbc_TC, past, part)
        x, b, c = xbc_TC.split([inner, shared, shared], dim=-1)
        y_TNP = ssd.prefill(
            x.unflatten(-1, (-1, self.head_dim)),
            time_step(dt_TN, self.dt_bias, self.time_step_limit),
            decay_rate(self.A_log),
            b.unflatten(-1, (-1, self.state_size)),
            c.unflatten(-1, (-1, self.state_size)),
            self.D,
            past.ssm_P___,
            past.slots_B,
            part.cu_seqlens_X,
        )
        return self.norm(y_TNP.flatten(-2), z_TI)

    def _zero_states(self, x_TH: Tensor, part: Part) -> StatePast:
        """Return zero states for sequences that are not cached."""
        channels, width = self.conv1d.weight.shape[0], self.conv1d.weight.shape[2]
        state = (self.num_heads, self.head_dim, self.state_size)
        return StatePast.zeros(part.num_sequences, (width - 1, channels), state, x_TH)
