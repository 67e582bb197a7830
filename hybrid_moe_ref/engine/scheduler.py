"""Continuous batching on one dp rank: which requests run in a step, and how many tokens each brings.

Pure bookkeeping, so that a run can be predicted without a model (see :func:`step_rows`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from hybrid_moe_ref.config import ConfigError, EngineConfig


@dataclass(frozen=True)
class Request:
    """A prompt to continue greedily by ``max_new_tokens``, or until one of ``stop_ids``; it reaches its rank at step
    ``arrival_step``."""

    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival_step: int = 0
    stop_ids: tuple[int, ...] = ()

    def until_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to and including the first that ends the text."""
        end = next((index + 1 for index, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return tokens[:end]


@dataclass(eq=False)
class Running:
    """A request that has begun.

    output      tokens that it has made so far
    drafts      guesses of what follows the last token
    num_cached  tokens of prompt and output that the model has run and the cache holds
    num_pages   pages of the cache that it holds, or is about to take in this step
    num_fed     tokens that it brings to this step
    """

    request: Request
    output: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_pages: int = 0
    num_fed: int = 0

    @property
    def pending(self) -> Sequence[int]:
        """Tokens that the model has still to run before it makes a new one: the prompt, then the last token. After a
        preemption everything, and after wrong drafts what was right of the step that had to be undone."""
        prompt = self.request.prompt
        if self.num_cached < len(prompt):
            return [*prompt[self.num_cached :], *self.output]
        return self.output[self.num_cached - len(prompt) :]

    @property
    def num_wanted(self) -> int:
        """Tokens that it would bring to a step without a limit."""
        return len(self.request.prompt) + len(self.output) - self.num_cached + len(self.drafts)

    def next_tokens(self) -> Sequence[int]:
        """What to feed in this step: the pending tokens, with drafts behind them, as far as they fit."""
        return [*self.pending, *self.drafts][: self.num_fed]

    @property
    def makes_tokens(self) -> bool:
        """Whether this step runs all that is pending, and so makes at least one new token."""
        return self.num_fed == self.num_wanted

    @property
    def num_left(self) -> int:
        """Tokens that are still to make."""
        return self.request.max_new_tokens - len(self.output)

    @property
    def is_complete(self) -> bool:
        """Whether no token is left to make."""
        return self.num_left <= 0 or any(token in self.request.stop_ids for token in self.output[-1:])

    def advance(self, new: Sequence[int]) -> None:
        """The step is over, and made these tokens: right drafts, and one behind them. After a wrong draft the cache is
        what it was before the step."""
        was_undone = self.makes_tokens and len(new) <= len(self.drafts)
        self.num_cached += 0 if was_undone else self.num_fed
        self.output.extend(new)
        self.drafts = []

    def start_again(self) -> None:
        """The cache holds nothing of it any more; what it has made stays."""
        self.drafts, self.num_cached, self.num_pages, self.num_fed = [], 0, 0, 0


class Scheduler:
    """Decode comes first, then as many waiting prompts as fit the budgets of tokens, sequences and pages, in order of
    arrival. What no step can hold at once is fed in parts.

    pages_for: tokens of a sequence -> pages of the cache that it takes; by default a cache that is never full

    Raises ConfigError for a request that the cache could never hold.
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
                raise ConfigError(f"request {request.request_id}: {name} of {number} tokens; at least 1 is needed")
        needed = self._pages_for(len(request.prompt) + request.max_new_tokens - 1)  # the last one is not fed
        if needed > self._config.num_pages:
            raise ConfigError(
                f"request {request.request_id}: {len(request.prompt)} prompt tokens and {request.max_new_tokens} new "
                f"ones take {needed} pages; engine.num_pages is {self._config.num_pages}"
            )

    @property
    def unfinished(self) -> bool:
        """Whether any request is running, waiting, or still to arrive."""
        return bool(self._running or self._waiting)

    @property
    def num_free_pages(self) -> int:
        """Pages that this step leaves; negative when it needs more than there are."""
        return self._config.num_pages - sum(running.num_pages for running in self._running)

    def make_room(self) -> list[Running]:
        """Preempt the youngest requests until the others have the pages of their next step. The preempted ones wait
        in front of all others, and run from the beginning again.

        The oldest request always goes on, so all are served in the end.
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
        """The requests of ``step``, admitting what arrived; empty when this rank is idle."""
        budget = self._share_tokens()
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            first = self._waiting[0]
            wanted = first.num_wanted
            if first.request.arrival_step > step or self._pages_for(wanted) > self.num_free_pages:
                break
            if budget < 1 or budget < wanted <= self._config.max_num_batched_tokens:
                break
            self._feed(first, min(wanted, budget))
            budget -= first.num_fed
            self._running.append(self._waiting.popleft())
        return list(self._running)

    def _share_tokens(self) -> int:
        """Give each running request its tokens of the step; returns what is left of the budget. Each gets what a
        decode step needs, which the budget always holds, and the oldest get what is left of it."""
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
        """Append the step's new tokens of each scheduled request; returns the requests that are complete."""
        complete = []
        for running, new in zip(self._running, tokens, strict=True):
            running.advance(new)
            if running.is_complete:
                self.finished[running.request.request_id] = running.output
                complete.append(running)
        self._running = [running for running in self._running if running not in complete]
        return complete

    def pretend(self) -> None:
        """Update without a model: each request that makes a token makes token 0."""
        self.update([[0] if running.makes_tokens else [] for running in self._running])


def step_rows(requests_by_rank: Sequence[Sequence[Request]], config: EngineConfig) -> list[list[int]]:
    """For each serve step, the rows that each rank's requests bring, 0 for an idle rank, until all are idle.

    Exact without a model, and without drafts, while no cache is full: greedy requests without `stop_ids` end by length
    alone.
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
    """For each serve step, the ranks that have live requests, until all are idle."""
    return [[rank for rank, rows in enumerate(step) if rows] for step in step_rows(requests_by_rank, config)]
