"""The base class of the three token mixers, which calls `mix` for each part of a step's batch.

The sequences of a part all have one new token, or all have more than one. Also, either all of them are in the cache of
KV entries and recurrent states, or none is. A batch whose sequences differ in one of these two ways has several parts.

Shapes: N rows of the batch, T rows of one part, H hidden.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hybrid_moe_ref.batch import Batch, Part


class Mixer(nn.Module):
    """A token mixer, called once per step and layer.

    pasts: one view of the cache for each `Group` of the batch (sequences with equally many new tokens) that is cached.
    None: every sequence starts without state, and no state is kept.
    """

    def forward(self, x_NH: Tensor, batch: Batch, pasts: Sequence | None = None) -> Tensor:
        outputs = []
        for part in batch.parts:
            mine = [pasts[index] for index in part.cached] if pasts else []
            outputs.append(self.mix(x_NH if part.is_step else x_NH[part.rows_T], part, mine))
        if len(outputs) == 1 and batch.parts[0].is_step:
            return outputs[0]
        return torch.cat(outputs)[batch.order_N] if outputs else torch.empty_like(x_NH)

    def mix(self, x_TH: Tensor, part: Part, pasts: list) -> Tensor:
        """Mix the T rows [T, H] of one part of the batch, one sequence after another. Returns rows [T, H].

        pasts: one view of the cache for each `Group` of the part (sequences with equally many new tokens); empty if the
        part is not cached
        """
        raise NotImplementedError
