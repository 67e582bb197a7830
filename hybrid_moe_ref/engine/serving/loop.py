"""The serve loop of one rank: step after step, until no rank has work left.

Every rank runs every step. A rank with requests runs their next tokens; a rank without requests runs a dummy batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache, Sequence
from hybrid_moe_ref.engine.policies import NewTokens, Policies
from hybrid_moe_ref.engine.serving.drafting import Drafting
from hybrid_moe_ref.engine.serving.sampling import last_tokens
from hybrid_moe_ref.engine.serving.scheduler import Running, Scheduler
from hybrid_moe_ref.engine.serving.steps import Steps
from hybrid_moe_ref.engine.serving.verification import Verification
from hybrid_moe_ref.engine.step.feed import Feed
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.model import HybridMoE

OnToken = Callable[[str, int], None]
"""Called with the id of a request and its new token."""


class ServeLoop:
    """Serves the requests of a scheduler, in steps. The loop ends on all ranks after the same step."""

    def __init__(
        self,
        scheduler: Scheduler,
        model: HybridMoE,
        cache: HybridCache,
        runner: ModelRunner,
        steps: Steps,
        drafting: Drafting,
        policies: Policies,
    ) -> None:
        self._scheduler = scheduler
        self._model = model
        self._cache = cache
        self._runner = runner
        self._steps = steps
        self._drafting = drafting
        self._policies = policies
        self._sequences: dict[Running, Sequence] = {}

    @torch.inference_mode()
    def run(self, on_token: OnToken | None = None) -> dict[str, list[int]]:
        """Serve all requests. Returns, for each request id, the new tokens of the request.

        on_token: called with the id of a request and each of its new tokens
        """
        scheduler, policies = self._scheduler, self._policies
        for step in itertools.count():
            asks = self._runner.protocol.asks(step + 1)
            policies.preemption.before_step(self._make_room)
            running = scheduler.schedule(step)
            if running:
                live = functools.partial(self._live, running, asks)
                tokens = policies.preemption.run(live, self._make_room)
                if on_token is not None:
                    for request_id, token in tokens:
                        on_token(request_id, token)
            elif (num_tokens := policies.idle.dummy_tokens(scheduler.unfinished)) is not None:
                policies.idle.run(functools.partial(self._steps.dummy, num_tokens, asks))
            else:
                self._runner.leave()
                break
            if asks and not self._runner.anyone_unfinished(scheduler.unfinished):
                break
        return scheduler.finished

    def _live(self, running: list[Running], asks: bool) -> NewTokens:
        """Run one step of this rank's requests. Returns (request id, new token) pairs.

        asks: whether the step ends with the question "is anyone unfinished?"
        """
        for request in running:
            if request not in self._sequences:
                self._sequences[request] = self._cache.allocate()
        mine = [self._sequences[request] for request in running]
        feeds = [Feed(r.request.request_id, r.num_cached, tuple(r.next_tokens())) for r in running]
        batch = Batch.of([(sequence, len(feed.tokens)) for sequence, feed in zip(mine, feeds, strict=True)])
        tokens_N = torch.tensor([token for feed in feeds for token in feed.tokens], device=self._cache.device)
        plan = self._steps.plan(feeds, len(running), asks)
        verification = Verification.begin(running, mine)
        hidden_NH = self._runner.execute(plan, tokens_N, batch, self._cache, feeds)
        chosen = last_tokens(self._model, hidden_NH, batch.last_rows.tolist(), verification.counts)
        made = verification.new_tokens(chosen)
        new_tokens = [r.request.until_stop(tokens) for r, tokens in zip(running, made, strict=True)]
        completed = self._scheduler.update(new_tokens)
        self._drafting.draft(running, mine, batch, tokens_N, hidden_NH)
        self._release(completed)
        return [(r.request.request_id, token) for r, new in zip(running, new_tokens, strict=True) for token in new]

    def _make_room(self) -> None:
        """Preempt requests if the cache has too few pages for the next step.

        A preempted request keeps its generated tokens. Later the model runs all its tokens again.
        """
        self._release(self._scheduler.make_room())

    def _release(self, requests: list[Running]) -> None:
        """Free the pages of `requests` in the model's cache and in the drafter's cache."""
        for request in requests:
            self._cache.free(self._sequences.pop(request))
            self._drafting.end(request)
