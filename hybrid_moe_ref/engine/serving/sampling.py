"""Choose the most likely token after each row that needs a new token.

The choice is greedy, so that a server can be compared with a single process token by token.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybrid_moe_ref.model import HybridMoE


def likeliest_tokens(model: HybridMoE, hidden_NH: Tensor) -> Tensor:
    """Return the most likely token after each row, int64[rows]. hidden_NH: final hidden states, [rows, hidden size]"""
    return model.logits(hidden_NH).argmax(dim=-1)


def last_tokens(
    model: HybridMoE, hidden_NH: Tensor, last_rows: Sequence[int], counts: Sequence[int]
) -> list[list[int]]:
    """Return, for each request, the most likely token after each of some rows of this request.

    For request i these are the `counts[i]` rows that end with row `last_rows[i]`.

    hidden_NH: final hidden states, [rows, hidden size]
    """
    rows = [row for last, count in zip(last_rows, counts, strict=True) for row in range(last + 1 - count, last + 1)]
    return [tokens.tolist() for tokens in likeliest_tokens(model, hidden_NH[rows]).split(list(counts))]
