"""Mixture of experts: a router chooses `top_k` experts for each token; a shared expert processes all tokens.

`MoE` calls `experts` with rows, weights and ids, and gets weighted sums. `MoE` does not know which rank has an expert.

Shapes: N tokens, H hidden, E experts, K experts per token, I intermediate.
"""

from typing import Self

import torch
import torch.nn.functional as F
from hybrid_moe_kernels import moe
from torch import Tensor, nn

from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.linear import has_global_hooks, is_plain_linear, is_unhooked, project


class MLP(nn.Module):
    """Gated MLP: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_NH: Tensor) -> Tensor:
        gate_NI, up_NI = project(x_NH, self.gate_proj, self.up_proj)
        (y_NH,) = project(F.silu(gate_NI) * up_NI, self.down_proj)
        return y_NH


class Router(nn.Module):
    """Chooses the top k experts of each token.

    The weights of these experts are a softmax over all experts, computed in float32 (float64 for float64 inputs), then
    renormalised so that the k weights sum to one.
    """

    def __init__(self, num_experts: int, top_k: int, hidden_size: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_NH: Tensor) -> tuple[Tensor, Tensor]:
        weights_NK, ids_NK = moe.route(F.linear(x_NH, self.weight), self.top_k)
        return weights_NK, ids_NK


class Experts(nn.Module):
    """The experts from `first_expert` to `first_expert + num_local - 1` of a layer's `num_experts`."""

    mlp = staticmethod(moe.experts)  # an engine may replace this by another backend

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        first_expert: int = 0,
        num_local: int | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.first_expert = num_experts, first_expert
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_local = num_experts if num_local is None else num_local
        if not 0 <= first_expert <= first_expert + self.num_local <= num_experts:
            last = first_expert + self.num_local - 1
            raise ValueError(f"experts {first_expert} to {last} are not all among the layer's {num_experts} experts")
        shape = (self.num_local, 2 * intermediate_size, hidden_size)
        self.gate_up_proj = nn.Parameter(torch.empty(shape))
        shape = (self.num_local, hidden_size, intermediate_size)
        self.down_proj = nn.Parameter(torch.empty(shape))

    def shard(self, first: int, count: int) -> Self:
        """Return a copy with only `count` experts, beginning with expert `first` of the layer."""
        start = first - self.first_expert
        if not 0 <= start <= start + count <= self.num_local:
            raise ValueError(
                f"experts {first} to {first + count - 1} are not all among the {self.num_local} experts of this module"
            )
        with torch.device("meta"):
            part = type(self)(
                self.num_experts,
                self.hidden_size,
                self.intermediate_size,
                first_expert=first,
                num_local=count,
            )
        for name, weight in self.named_parameters():
            held = weight.detach()[start : start + count].clone()
            part.register_parameter(name, nn.Parameter(held, requires_grad=weight.requires_grad))
        return part

    def forward(self, x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
        """Return, for each row, the weighted sum over those chosen experts that this module has; 0 if it has none.

        x_NH         N rows, one for each token, of hidden size H
        weights_NK   the weights of the K experts that the router chose for each token
        ids_NK       the ids of these experts, among all experts of the layer
        """
        local_NK = ids_NK - self.first_expert
        y_NH: Tensor = self.mlp(x_NH, weights_NK, local_NK, self.gate_up_proj, self.down_proj)
        return y_NH


class MoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, num_experts = config.hidden_size, config.num_experts
        self.gate = Router(num_experts, config.num_experts_per_tok, hidden)
        self.experts = Experts(num_experts, hidden, config.moe_intermediate_size)
        self.shared_expert = MLP(hidden, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x_NH: Tensor) -> Tensor:
        if self._is_one_call(x_NH):
            experts, shared = self.experts, self.shared_expert
            y_NH: Tensor = moe.mixture(
                x_NH,
                self.gate.weight,
                experts.gate_up_proj,
                experts.down_proj,
                shared.gate_proj.weight,
                shared.up_proj.weight,
                shared.down_proj.weight,
                self.shared_expert_gate.weight,
                top_k=self.gate.top_k,
            )
            return y_NH
        weights_NK, ids_NK = self.gate(x_NH)
        routed_NH = self.experts(x_NH, weights_NK, ids_NK)
        return routed_NH + self.shared_expert_gate(x_NH).sigmoid() * self.shared_expert(x_NH)

    def _is_one_call(self, x_NH: Tensor) -> bool:
        """Whether a single operation can compute the whole layer.

        It can if the backend of the experts has this operation, this module has all experts of the layer, and no module
        in the layer is replaced or has a hook.
        """
        experts, shared = self.experts, self.shared_expert
        return (
            moe.mixture.backend(x_NH) == moe.experts.backend(x_NH)
            and not has_global_hooks()
            and (type(self.gate), type(experts), type(shared)) == (Router, Experts, MLP)
            and is_unhooked(self.gate)
            and is_unhooked(experts)
            and is_unhooked(shared)
            and experts.num_local == experts.num_experts
            and experts.mlp is moe.experts
            and is_plain_linear(self.shared_expert_gate)
            and all(map(is_plain_linear, shared.children()))
        )
