"""Greedy decoding with a cache.

Shapes: B sequences, N tokens of a step.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import CacheExhausted, HybridCache, Sequence, cache_layout
from hybrid_moe_ref.config import InputError

if TYPE_CHECKING:
    from hybrid_moe_ref.model import HybridMoE


def stream(
    model: "HybridMoE",
    prompts: Tensor | list[Tensor],
    max_new_tokens: int,
    *,
    cache: HybridCache | None = None,
    prefill_chunk: int | None = None,
    stop_ids: Collection[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of each of the B sequences, [B], up to `max_new_tokens` times.

    prompts        token ids: [B, T], or a list of B prompts of any lengths
    cache          the cache to use; None: a new one that is just large enough
    prefill_chunk  largest number of tokens of a prompt in one step; None: all
    stop_ids       tokens that end a sequence; None: `model.stop_ids`. A sequence that has ended repeats its last token,
                   and the stream ends when all sequences have ended

    Raises InputError for invalid arguments, ValueError for a cache of another model, and CacheExhausted for a cache
    that is too small, before the first step.
    """
    prompts = list(prompts)
    if not prompts:
        raise InputError("prompts: at least 1 prompt is needed, got 0")
    for index, prompt in enumerate(prompts):
        if prompt.dim() != 1 or prompt.numel() == 0:
            raise InputError(f"prompt {index}: must be a row of at least 1 token, but has shape {tuple(prompt.shape)}")
        model.check_tokens(prompt)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens} is less than 1")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise InputError(f"prefill_chunk: {prefill_chunk} is less than 1")
    prompts = [prompt.to(model.device) for prompt in prompts]
    # The last token is yielded, but not added to the cache.
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
    stop_ids = frozenset(model.stop_ids if stop_ids is None else stop_ids)
    return _stream(model, prompts, max_new_tokens, cache, prefill_chunk, stop_ids)


def pages_needed(model: "HybridMoE", lengths: list[int]) -> int:
    """Return the number of pages that sequences of these lengths take in a cache of the model's dtype."""
    layout = cache_layout(model.config, model.dtype)
    return sum(layout.pages_for(length) for length in lengths)


@torch.no_grad()
def _stream(
    model: "HybridMoE",
    prompts: list[Tensor],
    max_new_tokens: int,
    cache: HybridCache,
    prefill_chunk: int | None,
    stop_ids: frozenset[int],
) -> Iterator[Tensor]:
    sequences: list[Sequence] = []
    try:
        sequences += [cache.allocate() for _ in prompts]
        tokens_B = prefill(model, prompts, sequences, cache, prefill_chunk)
        yield tokens_B
        running = list(range(len(prompts)))
        for _ in range(max_new_tokens - 1):
            if stop_ids:  # without stop_ids the tokens are not read, because reading them waits for the device
                newest = tokens_B.tolist()
                running = [index for index in running if newest[index] not in stop_ids]
                if not running:
                    return
            batch = Batch.of([(sequences[index], 1) for index in running])
            if len(running) == len(prompts):
                tokens_B = model.logits(model.step(tokens_B, batch, cache)).argmax(-1)
            else:
                next_tokens = model.logits(model.step(tokens_B[running], batch, cache)).argmax(-1)
                tokens_B = tokens_B.index_put((torch.tensor(running, device=tokens_B.device),), next_tokens)
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
    """Run each of B prompts, and append it to its sequence in `cache`. Returns the most probable next tokens [B].

    sequences: the sequence of each prompt
    prefill_chunk: largest number of tokens of a prompt in one step; None: all
    """
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
