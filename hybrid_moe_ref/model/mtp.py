"""Multi-token prediction (MTP): a small layer that predicts the token after the next one.

The input of this layer is the model's hidden state and the embedding of the next token. The layer has one attention
block with its own MLP or MoE, and uses the embedding and the head of the model. In checkpoints, the names of its
tensors begin with `mtp.`.

Shapes: N tokens of a step, H hidden.
"""

import dataclasses
import functools

import torch
from torch import Tensor, nn

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.pasts import Past
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.norm import RMSNorm
from hybrid_moe_ref.model.block import Block

DRAFT_STACK = "mtp.layers"
"""The name of the MTP layer's blocks in events and checkpoints."""


@functools.lru_cache
def draft_config(config: ModelConfig) -> ModelConfig:
    """Return the configuration for the MTP layer's cache: that of a model with one attention layer."""
    return dataclasses.replace(config, layer_pattern="A")


class MTP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps)
        self.layers = nn.ModuleList([Block(config, "A", f"{DRAFT_STACK}.0")])
        self.norm = RMSNorm(hidden, eps)

    def forward(
        self, embedded_NH: Tensor, hidden_NH: Tensor, batch: Batch, pasts: list[list[Past]] | None = None
    ) -> Tensor:
        """Return hidden states [N tokens, H hidden]: for the row at position i, the state that predicts token i + 2.

        embedded_NH  the embedding of token i + 1
        hidden_NH    for the first draft, the model's hidden state at position i; for later drafts, the result of this
                     method for the previous draft
        pasts        for each block of this layer, its views of the cache; None: the rows are not cached
        """
        both = torch.cat([self.pre_fc_norm_embedding(embedded_NH), self.pre_fc_norm_hidden(hidden_NH)], dim=-1)
        x_NH = self.fc(both)
        for index, block in enumerate(self.layers):
            x_NH = block(x_NH, batch, pasts[index] if pasts is not None else None)
        return self.norm(x_NH)
