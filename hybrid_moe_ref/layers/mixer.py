"""What the three token mixers share: a step's rows go through `mix` one group of equally long sequences at a
time.

Shapes: N rows of the step, T of them of one group, H hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybrid_moe_ref.batch import Batch, Group


class Mixer(nn.Module):
    """Called once per step and layer. `pasts` has what the cache holds for each group; None or an entry
    missing means that the group starts from nothing and nothing is kept."""

    def forward(self, x_NH: Tensor, batch: Batch, pasts: Sequence | None = None) -> Tensor:
        cached = iter(pasts or ())
        if len(batch.groups) == 1 and batch.num_tokens == x_NH.shape[0]:
            group = batch.groups[0]
            past = next(cached, None) if group.sequences else None
            return self.mix(x_NH, group, past)
        y_NH = torch.empty_like(x_NH)
        for group in batch.groups:
            past = next(cached, None) if group.sequences else None
            rows_T = group.rows_BT.flatten()
            y_NH[rows_T] = self.mix(x_NH[rows_T], group, past)
        return y_NH

    def mix(self, x_TH: Tensor, group: Group, past) -> Tensor:
        """The rows of one group, its sequences one after another."""
        raise NotImplementedError
