"""Draft tokens by the MTP layer (multi-token prediction) at the end of each step. The next step verifies the drafts.

The schedule of a step does not depend on the drafts of any rank. It is always the same:

    C1, the forward pass over known tokens and drafts, then `num_drafts` passes of the MTP layer

The first pass has the rows of the step, and fills the MTP layer's cache. Each later pass has one row per request. A
rank with nothing to draft takes part with dummy rows, because the layer has experts that the other ranks' tokens need.

Shapes: N rows of the step, B requests of this rank, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache, Sequence
from hybrid_moe_ref.cache.pages import TOKEN_MULTIPLE, PageLayout
from hybrid_moe_ref.config import EngineConfig
from hybrid_moe_ref.engine.policies import DraftPolicy
from hybrid_moe_ref.engine.serving.sampling import likeliest_tokens
from hybrid_moe_ref.engine.serving.scheduler import Running
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.generation.speculative import draft_cache
from hybrid_moe_ref.model import HybridMoE


class Drafting:
    """Drafts tokens for the requests of one rank by the MTP layer. If the setting `num_drafts` is 0, does nothing."""

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
        """Return this rank's number of rows in each pass of the MTP layer after the first.

        There is one row for each request. A rank without requests has one dummy row. If the setting `num_drafts` is 0,
        there are no passes, and the result is 0.

        num_live: number of requests of this rank in the step
        """
        return max(1, num_live) if self._engine.num_drafts else 0

    def allocate(self) -> None:
        """Allocate the MTP layer's cache, for all tokens that the model's cache can hold and their drafts."""
        if self._engine.num_drafts:
            num_tokens = self._max_tokens + self._engine.max_num_seqs * self._engine.num_drafts
            self._cache = draft_cache(self._model, num_tokens, self._engine.max_num_seqs)

    def draft(
        self, running: list[Running], sequences: list[Sequence], batch: Batch, tokens_N: Tensor, hidden_NH: Tensor
    ) -> None:
        """Draft the tokens that follow the last token of each request, and store them in the request's `drafts`.

        Call this at the end of a step, after its drafts are verified.

        running    the requests that ran in the step
        sequences  the sequence of each request in the model's cache
        batch, tokens_N, hidden_NH
                   the step's batch, its tokens [rows], and the model's hidden states [rows, hidden size]
        """
        cache = self._cache
        room = [max(0, min(self._engine.num_drafts, request.num_left - 1)) for request in running]
        num_passes = self._policy.num_passes(self._engine.num_drafts, max(room))
        if not num_passes or cache is None:
            return
        for request in running:
            if request not in self._sequences:
                self._sequences[request] = cache.allocate()
        mine = [self._sequences[request] for request in running]
        last_rows = batch.last_rows
        counts = last_rows.diff(prepend=last_rows.new_full((1,), -1)).tolist()
        follows_N = tokens_N.roll(-1)
        follows_N[last_rows] = torch.tensor([request.pending[0] for request in running], device=tokens_N.device)
        guesses: list[list[int]] = []
        for number in range(num_passes):
            batch = Batch.of(list(zip(mine, counts, strict=True)))
            hidden_BH = self._runner.draft(number, follows_N, hidden_NH, batch, cache)[batch.last_rows]
            follows_N, hidden_NH, counts = likeliest_tokens(self._model, hidden_BH), hidden_BH, [1] * len(mine)
            guesses.append(follows_N.tolist())
        for request, sequence, kept, count, drafts in zip(
            running, mine, sequences, room, zip(*guesses, strict=True), strict=True
        ):
            # If passes were skipped, the drafter's cache has fewer tokens than the model's. Then the drafts are worse,
            # but valid.
            cache.truncate(sequence, min(kept.length, sequence.length))
            request.drafts = [] if len(request.pending) > 1 else list(drafts[:count])

    def draft_dummy(self, tokens_N: Tensor, hidden_NH: Tensor, batch: Batch) -> None:
        """Run the drafter's passes on a rank without requests, together with the other ranks, after a dummy batch.

        batch, tokens_N, hidden_NH
                   the dummy batch, its tokens [rows], and the model's hidden states [rows, hidden size]
        """
        for number in range(self._policy.num_passes(self._engine.num_drafts, None)):
            hidden_NH = self._runner.draft(number, tokens_N, hidden_NH, batch, None)
            if not number:
                batch = Batch.dummy(1, tokens_N.device)
                tokens_N, hidden_NH = tokens_N.new_zeros(1), hidden_NH.new_zeros(1, hidden_NH.shape[1])

    def end(self, request: Running) -> None:
        """Free the pages that a complete or preempted request has in the drafter's cache."""
        if self._cache is not None and request in self._sequences:
            self._cache.free(self._sequences.pop(request))
