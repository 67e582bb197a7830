"""Continuous batching on one dp rank: decide which requests run in a step, and with how many tokens each.

The scheduler needs no model, so a run can be predicted without one (see :func:`step_rows`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hybrid_moe_ref.config import ConfigError, EngineConfig


@dataclass(frozen=True)
class Request:
    """A prompt to continue greedily, by ``max_new_tokens`` tokens; a token of ``stop_ids`` ends the text earlier.

    arrival_step: the step before which the request reaches its rank; the first step of `Engine.serve` is 0
    """

    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival_step: int = 0
    stop_ids: tuple[int, ...] = ()

    def until_stop(self, tokens: list[int]) -> list[int]:
        """Return `tokens` up to and including the first token of ``stop_ids``; all tokens if there is none."""
        end = next((index + 1 for index, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return tokens[:end]


@dataclass(eq=False)
class Running:
    """A request in the scheduler, and its progress.

    output      tokens generated so far
    drafts      drafted tokens after the last token
    num_cached  number of tokens of prompt and output that are in the cache
    num_pages   number of cache pages that the request has, including those that it takes in this step
    num_fed     number of tokens of the request that the model runs in this step
    """

    request: Request
    output: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_pages: int = 0
    num_fed: int = 0

    @property
    def pending(self) -> Sequence[int]:
        """Return the tokens that the model must run before it makes a new token.

        These are, at first, the tokens of the prompt that no earlier step has run; later, the last token. In two cases
        there are more:

        - after a preemption: all tokens of prompt and output;
        - after a step with a rejected draft, which was undone in the cache: the last token before this step, the
          accepted drafts, and the token that the model chose after these drafts.
        """
        prompt = self.request.prompt
        if self.num_cached < len(prompt):
            return [*prompt[self.num_cached :], *self.output]
        return self.output[self.num_cached - len(prompt) :]

    @property
    def num_wanted(self) -> int:
        """Return the number of tokens that the request would run in a step if steps had no limit of tokens."""
        return len(self.request.prompt) + len(self.output) - self.num_cached + len(self.drafts)

    def next_tokens(self) -> Sequence[int]:
        """Return the tokens to run in this step: the first ``num_fed`` tokens of ``pending`` followed by ``drafts``."""
        return [*self.pending, *self.drafts][: self.num_fed]

    @property
    def makes_tokens(self) -> bool:
        """Whether this step makes a new token: it runs all tokens of the request that the model has not run yet."""
        return self.num_fed == self.num_wanted

    @property
    def num_left(self) -> int:
        """Return the number of tokens that are still to be generated."""
        return self.request.max_new_tokens - len(self.output)

    @property
    def is_complete(self) -> bool:
        """Whether all tokens have been generated, or the last one ends the text."""
        return self.num_left <= 0 or any(token in self.request.stop_ids for token in self.output[-1:])

    def advance(self, new: Sequence[int]) -> None:
        """Record the step's new tokens: the accepted drafts, and one token after them.

        If a draft was rejected, the verification has set the cache back to its state before the step. Then `num_cached`
        does not change, and the next step runs the accepted drafts again (see `pending`).

        new: [] if the step made no new token, because it did not run all tokens of the request
        """
        was_undone = self.makes_tokens and len(new) <= len(self.drafts)
        self.num_cached += 0 if was_undone else self.num_fed
        self.output.extend(new)
        self.drafts = []

    def start_again(self) -> None:
        """Forget the cached tokens after a preemption. The generated tokens stay."""
        self.drafts, self.num_cached, self.num_pages, self.num_fed = [], 0, 0, 0


class Scheduler:
    """Schedules the requests of one dp rank.

    Running requests come first, then as many waiting prompts as the budgets of tokens, sequences and pages allow, in
    order of arrival. A prompt that is too long for one step is run in several steps.

    pages_for: a function from the length of a sequence to the number of cache pages that it takes. The default returns
    0, so that the cache is never full

    Raises ConfigError if a request has no prompt, asks for no new token or could never fit into the cache, and if two
    requests have the same id.
    """

    def __init__(
        self, requests: Iterable[Request], config: EngineConfig, pages_for: Callable[[int], int] = lambda length: 0
    ) -> None:
        self._config = config
        self._pages_for = pages_for
        self._waiting = deque(map(Running, sorted(requests, key=lambda request: request.arrival_step)))
        self._running: list[Running] = []
        self.finished: dict[str, list[int]] = {}
        if len({waiting.request.request_id for waiting in self._waiting}) < len(self._waiting):
            raise ConfigError("two requests have the same request_id")
        for waiting in self._waiting:
            self._check(waiting.request)

    def _check(self, request: Request) -> None:
        for name, number in (("prompt", len(request.prompt)), ("max_new_tokens", request.max_new_tokens)):
            if number < 1:
                raise ConfigError(f"request {request.request_id}: {name} has {number} tokens, but needs at least 1")
        # The model never runs the last token.
        needed = self._pages_for(len(request.prompt) + request.max_new_tokens - 1)
        if needed > self._config.num_pages:
            raise ConfigError(
                f"request {request.request_id}: {len(request.prompt)} prompt tokens and {request.max_new_tokens} new "
                f"ones take {needed} pages, but engine.num_pages is {self._config.num_pages}"
            )

    @property
    def unfinished(self) -> bool:
        """Whether any request is running, waiting, or still to arrive."""
        return bool(self._running or self._waiting)

    @property
    def num_free_pages(self) -> int:
        """Return how many pages are free after this step; negative if the step needs more pages than the cache has."""
        return self._config.num_pages - sum(running.num_pages for running in self._running)

    def make_room(self) -> list[Running]:
        """Preempt the youngest requests until the other requests have pages for their next step.

        Returns the preempted requests. They are admitted again before any other waiting request, and then the model
        runs all their tokens again. The oldest request is never preempted, so all requests are served in the end.
        """
        preempted = []
        self._share_tokens()
        while self.num_free_pages < 0 and len(self._running) > 1:
            youngest = self._running.pop()
            youngest.start_again()
            self._waiting.appendleft(youngest)
            preempted.append(youngest)
            self._share_tokens()
        return preempted

    def schedule(self, step: int) -> list[Running]:
        """Admit requests that have arrived. Returns the requests that run in ``step``; [] if this rank is idle."""
        budget = self._share_tokens()
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            first = self._waiting[0]
            num_wanted = first.num_wanted
            if first.request.arrival_step > step or self._pages_for(num_wanted) > self.num_free_pages:
                break
            if budget < 1 or budget < num_wanted <= self._config.max_num_batched_tokens:
                break
            self._feed(first, min(num_wanted, budget))
            budget -= first.num_fed
            self._running.append(self._waiting.popleft())
        return list(self._running)

    def _share_tokens(self) -> int:
        """Decide how many tokens each running request runs in the step. Returns the remaining budget of tokens.

        First, each request gets up to 1 + `num_drafts` tokens, as in a decode step; the budget is always large enough
        for that. Then requests that need more tokens get them from the remaining budget, the oldest request first.
        """
        decode = 1 + self._config.num_drafts
        budget = self._config.max_num_batched_tokens - sum(min(r.num_wanted, decode) for r in self._running)
        for running in self._running:
            extra = min(max(0, running.num_wanted - decode), budget)
            self._feed(running, min(running.num_wanted, decode) + extra)
            budget -= extra
        return budget

    def _feed(self, running: Running, num_tokens: int) -> None:
        running.num_fed = num_tokens
        running.num_pages = max(running.num_pages, self._pages_for(running.num_cached + num_tokens))

    def update(self, tokens: Sequence[Sequence[int]]) -> list[Running]:
        """Record the new tokens of the step. Returns the requests that are now complete.

        tokens: the new tokens of each request that `schedule` returned, in the same order
        """
        complete = []
        for running, new in zip(self._running, tokens, strict=True):
            running.advance(new)
            if running.is_complete:
                self.finished[running.request.request_id] = running.output
                complete.append(running)
        self._running = [running for running in self._running if running not in complete]
        return complete

    def pretend(self) -> None:
        """Update the requests without a model: each request that would make a token gets token 0."""
        self.update([[0] if running.makes_tokens else [] for running in self._running])


def step_rows(requests_by_rank: Sequence[Sequence[Request]], config: EngineConfig) -> list[list[int]]:
    """Predict, without a model, how many rows (tokens) each dp rank has in each step, until all ranks are idle.

    Returns a list of steps; each step is a list with the number of rows of each rank (0: an idle rank). The prediction
    is exact if there are no drafts, no request has `stop_ids`, and no cache gets full.
    """
    schedulers = [Scheduler(requests, config) for requests in requests_by_rank]
    steps: list[list[int]] = []
    while any(scheduler.unfinished for scheduler in schedulers):
        rows = []
        for scheduler in schedulers:
            rows.append(sum(running.num_fed for running in scheduler.schedule(len(steps))))
            scheduler.pretend()
        steps.append(rows)
    return steps


def live_ranks(requests_by_rank: Sequence[Sequence[Request]], config: EngineConfig) -> list[list[int]]:
    """Predict, for each step until all ranks are idle, the numbers of the dp ranks that have requests.

    For the conditions of the prediction, see `step_rows`.
    """
    return [[rank for rank, rows in enumerate(step) if rows] for step in step_rows(requests_by_rank, config)]
