"""What the three token mixers share: a step's rows go through `mix` one group of equally long sequences at a
time.

Shapes: N rows of the step, B sequences of a group, T tokens each, H hidden.
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
            return self.mix(x_NH.unflatten(0, (-1, group.length)), group, past).flatten(0, 1)
        y_NH = torch.empty_like(x_NH)
        for group in batch.groups:
            past = next(cached, None) if group.sequences else None
            y_NH[group.rows_BT] = self.mix(x_NH[group.rows_BT], group, past)
        return y_NH

    def mix(self, x_BTH: Tensor, group: Group, past) -> Tensor:
        raise NotImplementedError
