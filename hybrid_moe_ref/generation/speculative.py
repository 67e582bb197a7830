"""Speculative greedy decoding: a drafter proposes some tokens, and the model verifies all of them in one step.

The result equals plain greedy decoding for every drafter, because a draft is accepted only if the model chooses the
same token. (In float32 a step over several tokens rounds differently from a step over one token, so near-equal logits
can change their order. In float64 no difference was seen.)

A recurrent state cannot be truncated to the last accepted token. Instead the state is restored from a snapshot, and the
accepted tokens run again. A step whose drafts are all accepted needs no second run.

Shapes: T tokens, H hidden.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache
from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.config import InputError
from hybrid_moe_ref.generation.greedy import pages_needed
from hybrid_moe_ref.model.mtp import draft_config

if TYPE_CHECKING:
    from hybrid_moe_ref.model import HybridMoE


class Drafter(Protocol):
    def propose(self, tokens_T: Tensor, hidden_TH: Tensor, count: int) -> Tensor:
        """Return `count` proposed tokens that follow `tokens_T`.

        tokens_T: the T newly accepted tokens
        hidden_TH: hidden states, [T, hidden size]; `hidden_TH[i]` is that of the position before `tokens_T[i]`
        """


@dataclass
class Statistics:
    """Numbers of verification steps, of proposed drafts and of accepted drafts."""

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


def draft_cache(model: "HybridMoE", num_tokens: int, num_sequences: int) -> HybridCache:
    """Create the MTP layer's own cache, for `num_sequences` sequences with `num_tokens` tokens in total.

    The MTP layer (multi-token prediction) proposes tokens.
    """
    config = draft_config(model.config)
    num_pages = page_layout(config, model.dtype.itemsize).pages_for(num_tokens) + num_sequences
    return HybridCache(config, num_pages, model.device, model.dtype)


class MTPDrafter:
    """Proposes tokens for one sequence by the model's MTP layer (multi-token prediction), one token after another.

    max_length: largest number of tokens of the sequence

    Raises InputError if the model has no MTP layer.
    """

    def __init__(self, model: "HybridMoE", max_length: int) -> None:
        if not model.config.num_mtp_layers:
            raise InputError("the model has no MTP layer (num_mtp_layers is 0)")
        self._model = model
        self._cache = draft_cache(model, max_length, 1)
        self._sequence = self._cache.allocate()

    def propose(self, tokens_T: Tensor, hidden_TH: Tensor, count: int) -> Tensor:
        if not count:
            return tokens_T[:0]
        hidden_H = self._step(tokens_T, hidden_TH)
        certain = self._sequence.length
        guesses = [self._model.logits(hidden_H).argmax(-1)]
        while len(guesses) < count:
            hidden_H = self._step(guesses[-1][None], hidden_H[None])
            guesses.append(self._model.logits(hidden_H).argmax(-1))
        self._cache.truncate(self._sequence, certain)
        return torch.stack(guesses)

    def _step(self, tokens_T: Tensor, hidden_TH: Tensor) -> Tensor:
        batch = Batch.of([(self._sequence, len(tokens_T))])
        return self._model.draft(tokens_T, hidden_TH, batch, self._cache)[-1]


def speculative_stream(
    model: "HybridMoE",
    prompt_T: Tensor,
    max_new_tokens: int,
    *,
    num_drafts: int = 3,
    drafter: Drafter | None = None,
    statistics: Statistics | None = None,
    stop_ids: Collection[int] | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` greedy tokens after one prompt, up to and including one of `stop_ids`.

    num_drafts   largest number of drafts (proposed tokens) in one step
    drafter      proposes the drafts; None: the model's MTP layer proposes them
    statistics   is updated in every step; None: nothing is counted
    stop_ids     tokens that end the text; None: `model.stop_ids`

    Raises InputError for invalid arguments, before the first step.
    """
    if prompt_T.dim() != 1 or prompt_T.numel() == 0:
        raise InputError(f"the prompt must be a row of at least 1 token, but has shape {tuple(prompt_T.shape)}")
    if max_new_tokens < 1 or num_drafts < 1:
        name, value = ("max_new_tokens", max_new_tokens) if max_new_tokens < 1 else ("num_drafts", num_drafts)
        raise InputError(f"{name}: {value} is less than 1")
    model.check_tokens(prompt_T)
    prompt_T = prompt_T.to(model.device)
    length = len(prompt_T) + max_new_tokens
    drafter = drafter or MTPDrafter(model, length)
    tokens = _speculative_stream(model, prompt_T, max_new_tokens, num_drafts, drafter, statistics or Statistics())
    return _until(tokens, frozenset(model.stop_ids if stop_ids is None else stop_ids))


def _until(tokens: Iterator[int], stop_ids: frozenset[int]) -> Iterator[int]:
    """Yield the tokens up to and including the first of `stop_ids`."""
    for token in tokens:
        yield token
        if token in stop_ids:
            return


@torch.no_grad()
def _speculative_stream(
    model: "HybridMoE", prompt_T: Tensor, max_new_tokens: int, num_drafts: int, drafter: Drafter, statistics: Statistics
) -> Iterator[int]:
    num_pages = pages_needed(model, [len(prompt_T) + max_new_tokens])
    cache = HybridCache(model.config, num_pages, model.device, model.dtype)
    sequence = cache.allocate()
    hidden_TH = model.step(prompt_T, Batch.of([(sequence, len(prompt_T))]), cache)
    chosen_T = model.logits(hidden_TH[-1:]).argmax(-1)
    known_T, left = torch.cat([prompt_T[1:], chosen_T]), max_new_tokens - 1
    yield int(chosen_T)
    while left:
        drafts_T = drafter.propose(known_T, hidden_TH, min(num_drafts, left - 1))
        before = cache.snapshot(sequence)
        inputs_T = torch.cat([known_T[-1:], drafts_T])
        hidden_TH = model.step(inputs_T, Batch.of([(sequence, len(inputs_T))]), cache)
        chosen_T = model.logits(hidden_TH).argmax(-1)
        num_right = int((drafts_T == chosen_T[:-1]).cumprod(0).sum())
        if num_right < len(drafts_T):
            cache.restore(sequence, before)
            kept_T = inputs_T[: num_right + 1]
            hidden_TH = model.step(kept_T, Batch.of([(sequence, len(kept_T))]), cache)
        statistics.num_steps += 1
        statistics.num_drafted += len(drafts_T)
        statistics.num_accepted += num_right
        known_T, left = chosen_T[: num_right + 1], left - num_right - 1
        yield from known_T.tolist()
