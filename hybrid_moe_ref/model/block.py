"""One layer of the model: a token mixer and an MLP, each with a norm before it and a residual connection.

Shapes: N tokens of a step, H hidden.
"""

from torch import Tensor, nn

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.pasts import Past
from hybrid_moe_ref.config import LAYER_KINDS, ModelConfig
from hybrid_moe_ref.layers.attention import GatedAttention
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.mamba2 import Mamba2
from hybrid_moe_ref.layers.mixer import Mixer
from hybrid_moe_ref.layers.moe import MLP, MoE
from hybrid_moe_ref.layers.norm import RMSNorm

MIXERS: dict[str, type[Mixer]] = {"G": GatedDeltaNet, "A": GatedAttention, "M": Mamba2}


class Block(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)).

    As in checkpoints, the name of the mixer module depends on its kind, see LAYER_KINDS.
    """

    def __init__(self, config: ModelConfig, kind: str, name: str) -> None:
        super().__init__()
        self.kind, self.name = kind, name
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.add_module(LAYER_KINDS[kind], MIXERS[kind](config))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_experts:
            self.mlp: nn.Module = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    @property
    def mixer(self) -> nn.Module:
        mixer = self._modules[LAYER_KINDS[self.kind]]
        assert mixer is not None
        return mixer

    def forward(self, x_NH: Tensor, batch: Batch, pasts: list[Past] | None = None) -> Tensor:
        x_NH = x_NH + self.mixer(self.input_layernorm(x_NH), batch, pasts)
        return x_NH + self.mlp(self.post_attention_layernorm(x_NH))
