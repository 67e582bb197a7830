"""Speculative decoding in the server: a step verifies the drafts of the last step, then its drafter makes new ones.

The schedule of every step is fixed. It does not depend on the drafts of any rank:

    C1, the forward pass over known tokens and drafts, then `num_drafts` passes of the MTP layer

The first pass has the rows of the step, which updates the MTP layer's cache; each later pass has one row per request. A
rank with nothing to draft takes part with dummy rows, because the layer has experts that the other ranks' tokens need.

A recurrent state cannot be truncated to the last accepted draft. After a rejected draft the request's state returns to
the start of the step, and the next step feeds the accepted tokens again, without new drafts. So a rejected draft costs
rows of the next step, never an extra step that other ranks would not take part in.

Shapes: N rows of the step, B requests of this rank, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache, Sequence, Snapshot
from hybrid_moe_ref.cache.pages import TOKEN_MULTIPLE, PageLayout
from hybrid_moe_ref.config import EngineConfig
from hybrid_moe_ref.engine.policies import DraftPolicy
from hybrid_moe_ref.engine.runner import ModelRunner
from hybrid_moe_ref.engine.scheduler import Running
from hybrid_moe_ref.generation.speculative import draft_cache
from hybrid_moe_ref.model import HybridMoE


@dataclass(frozen=True, eq=False)
class Check:
    """The drafts that a step verifies, and the snapshots to undo them."""

    running: list[Running]
    sequences: list[Sequence]
    batch: Batch
    before: list[Snapshot | None]

    @property
    def counts(self) -> list[int]:
        """The number of rows of each request to sample a token after: its last known token and its drafts.

        0 for a request that still has pending tokens.
        """
        return [1 + len(running.drafts) if running.makes_tokens else 0 for running in self.running]

    def new_tokens(self, chosen: list[list[int]]) -> list[list[int]]:
        """The accepted drafts of each request, and the model's next token after them.

        Restores the cache of a request with a rejected draft to its state before the step.

        chosen: the model's choices after the rows of each request, as many as `counts`
        """
        new = []
        for running, sequence, before, choices in zip(self.running, self.sequences, self.before, chosen, strict=True):
            num_right = next((i for i, draft in enumerate(running.drafts) if draft != choices[i]), len(running.drafts))
            if num_right < len(running.drafts):
                assert before is not None
                sequence.cache.restore(sequence, before)
            new.append(choices[: num_right + 1])
        return new


class Drafting:
    """One rank's drafter. If `num_drafts` is 0 it drafts nothing, and every step makes one token per request."""

    def __init__(
        self,
        model: HybridMoE,
        runner: ModelRunner,
        policy: DraftPolicy,
        engine: EngineConfig,
        pages: PageLayout,
    ) -> None:
        self._model, self._runner, self._policy, self._engine = model, runner, policy, engine
        self._max_tokens = engine.num_pages * max(pages.tokens, TOKEN_MULTIPLE)
        self._cache: HybridCache | None = None
        self._sequences: dict[Running, Sequence] = {}

    def num_rows(self, num_live: int) -> int:
        """The number of rows of this rank in every pass after the first; an idle rank has a dummy row."""
        return max(1, num_live) if self._engine.num_drafts else 0

    def allocate(self) -> None:
        """Allocate the MTP layer's cache, for all tokens that the model's cache can hold and their drafts."""
        if self._engine.num_drafts:
            num_tokens = self._max_tokens + self._engine.max_num_seqs * self._engine.num_drafts
            self._cache = draft_cache(self._model, num_tokens, self._engine.max_num_seqs)

    def begin(self, running: list[Running], sequences: list[Sequence], batch: Batch) -> Check:
        """Take snapshots before a step over the requests' next tokens."""
        before = [
            sequence.cache.snapshot(sequence) if request.drafts else None
            for request, sequence in zip(running, sequences, strict=True)
        ]
        return Check(running, sequences, batch, before)

    def draft(self, check: Check, tokens_N: Tensor, hidden_NH: Tensor) -> None:
        """Draft the tokens after the last token of each request, for its next step."""
        running, cache = check.running, self._cache
        room = [max(0, min(self._engine.num_drafts, request.num_left - 1)) for request in running]
        num_passes = self._policy.num_passes(self._engine.num_drafts, max(room))
        if not num_passes or cache is None:
            return
        for request in running:
            if request not in self._sequences:
                self._sequences[request] = cache.allocate()
        mine = [self._sequences[request] for request in running]
        last_rows = check.batch.last_rows
        counts = last_rows.diff(prepend=last_rows.new_full((1,), -1)).tolist()
        follows_N = tokens_N.roll(-1)
        follows_N[last_rows] = torch.tensor([request.pending[0] for request in running], device=tokens_N.device)
        guesses: list[list[int]] = []
        for number in range(num_passes):
            batch = Batch.of(list(zip(mine, counts, strict=True)))
            hidden_BH = self._runner.draft(number, follows_N, hidden_NH, batch, cache)[batch.last_rows]
            follows_N, hidden_NH, counts = self._model.logits(hidden_BH).argmax(dim=-1), hidden_BH, [1] * len(mine)
            guesses.append(follows_N.tolist())
        for request, sequence, kept, count, drafts in zip(
            running, mine, check.sequences, room, zip(*guesses, strict=True), strict=True
        ):
            # After skipped passes the drafter's cache lags behind the model's. Its drafts are then worse, but valid.
            cache.truncate(sequence, min(kept.length, sequence.length))
            request.drafts = [] if len(request.pending) > 1 else list(drafts[:count])

    def draft_dummy(self, tokens_N: Tensor, hidden_NH: Tensor, batch: Batch) -> None:
        """Take part in the others' drafting, on a rank without requests."""
        for number in range(self._policy.num_passes(self._engine.num_drafts, None)):
            hidden_NH = self._runner.draft(number, tokens_N, hidden_NH, batch, None)
            if not number:
                batch = Batch.dummy(1, tokens_N.device)
                tokens_N, hidden_NH = tokens_N.new_zeros(1), hidden_NH.new_zeros(1, hidden_NH.shape[1])

    def end(self, request: Running) -> None:
        """Free the cache of a request that is complete or preempted."""
        if self._cache is not None and request in self._sequences:
            self._cache.free(self._sequences.pop(request))
