"""Greedy decoding with a cache.

Shapes: B sequences, N tokens of a step.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache import CacheExhausted, HybridCache, Sequence, cache_layout

if TYPE_CHECKING:
    from hybrid_moe_ref.model import HybridMoE


def stream(
    model: "HybridMoE",
    prompts: Tensor | list[Tensor],
    max_new_tokens: int,
    *,
    cache: HybridCache | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, [B], `max_new_tokens` times.

    `prompts` is [B, T], or a list of B prompts of any lengths. `prefill_chunk` bounds the tokens of a prompt that one
    step takes. `cache` None makes one that is just large enough. All is checked before the first step.
    """
    prompts = list(prompts)
    if not prompts:
        raise ValueError("wanted at least 1 prompt, got 0")
    for index, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise ValueError(f"prompt {index}: wanted a row of at least 1 token, got shape {tuple(prompt.shape)}")
        model.check_tokens(prompt)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is less than 1")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk: {prefill_chunk} is less than 1")
    prompts = [prompt.to(model.device) for prompt in prompts]
    # The last token is given out, not stored.
    num_pages = pages_needed(model, [len(prompt) + max_new_tokens - 1 for prompt in prompts])
    if cache is None:
        cache = HybridCache(model.config, num_pages, model.device, model.dtype)
    else:
        cache.check_model(model.config, model.dtype)
    if num_pages > cache.num_free_pages:
        lengths = f"{max(map(len, prompts))} + {max_new_tokens} tokens"
        raise CacheExhausted(
            num_pages, cache.num_free_pages, f"generation for {len(prompts)} prompts of up to {lengths}"
        )
    return _stream(model, prompts, max_new_tokens, cache, prefill_chunk)


def pages_needed(model: "HybridMoE", lengths: list[int]) -> int:
    """Pages that sequences of these lengths take in a cache of the model's dtype."""
    layout = cache_layout(model.config, model.dtype)
    return sum(layout.pages_for(length) for length in lengths)


def _stream(
    model: "HybridMoE", prompts: list[Tensor], max_new_tokens: int, cache: HybridCache, prefill_chunk: int | None
) -> Iterator[Tensor]:
    sequences: list[Sequence] = []
    try:
        sequences += [cache.allocate() for _ in prompts]
        tokens_B = prefill(model, prompts, sequences, cache, prefill_chunk)
        yield tokens_B
        for _ in range(max_new_tokens - 1):
            hidden_BH = model.step(tokens_B, Batch.of([(sequence, 1) for sequence in sequences]), cache)
            tokens_B = model.logits(hidden_BH).argmax(-1)
            yield tokens_B
    finally:
        for sequence in sequences:
            cache.free(sequence)


def prefill(
    model: "HybridMoE",
    prompts: list[Tensor],
    sequences: list[Sequence],
    cache: HybridCache,
    prefill_chunk: int | None = None,
) -> Tensor:
    """Put each prompt behind what its sequence already has; the likeliest next tokens, [B]."""
    next_tokens = prompts[0].new_empty(len(prompts))
    left = list(enumerate(prompts))
    while left:
        parts = [(index, prompt[:prefill_chunk]) for index, prompt in left]
        batch = Batch.of([(sequences[index], len(part)) for index, part in parts])
        hidden_NH = model.step(torch.cat([part for _, part in parts]), batch, cache)
        tokens_B = model.logits(hidden_NH[batch.last_rows]).argmax(-1)
        next_tokens[[index for index, _ in left]] = tokens_B
        left = [
            (i, rest) for (i, prompt), (_, part) in zip(left, parts, strict=True) if len(rest := prompt[len(part) :])
        ]
    return next_tokens
