"""Continuous batching on one dp rank: which requests run in a step, and how many tokens each brings.

Pure bookkeeping, so that a run can be foretold without a model (see :func:`step_rows`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hybrid_moe_ref.config import ConfigError, EngineConfig


@dataclass(frozen=True)
class Request:
    """A prompt to continue greedily by ``max_new_tokens``; it reaches its rank at step ``arrival_step``."""

    request_id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    arrival_step: int = 0


@dataclass(eq=False)
class Running:
    """A request that has begun: the tokens it made so far; no token yet means that its prompt is still to run.

    forgotten   tokens before the last one that the model has run, but had to forget with wrong drafts behind them
    drafts      guesses of what follows the last token
    """

    request: Request
    output: list[int] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    def next_tokens(self) -> Sequence[int]:
        """What to feed next: the whole prompt, then one token at a time, with drafts behind it."""
        return [*self.forgotten, self.output[-1], *self.drafts] if self.output else self.request.prompt

    @property
    def num_left(self) -> int:
        """Tokens that are still to make."""
        return self.request.max_new_tokens - len(self.output)


class Scheduler:
    """Decode comes first, then as many waiting prompts as fit the token and sequence budgets, in order of arrival.

    Raises ConfigError for a prompt that no step could ever hold.
    """

    def __init__(self, requests: Iterable[Request], config: EngineConfig) -> None:
        self._config = config
        self._waiting = deque(sorted(requests, key=lambda request: request.arrival_step))
        self._running: list[Running] = []
        self.finished: dict[str, list[int]] = {}
        if len({request.request_id for request in self._waiting}) < len(self._waiting):
            raise ConfigError("two requests have the same request_id")
        for request in self._waiting:
            if not 0 < len(request.prompt) <= config.max_num_batched_tokens:
                raise ConfigError(
                    f"request {request.request_id}: prompt of {len(request.prompt)} tokens; "
                    f"engine.max_num_batched_tokens allows 1 to {config.max_num_batched_tokens}"
                )

    @property
    def unfinished(self) -> bool:
        """Whether any request is running, waiting, or still to arrive."""
        return bool(self._running or self._waiting)

    def schedule(self, step: int) -> list[Running]:
        """The requests of ``step``, admitting what arrived; empty when this rank is idle."""
        budget = self._config.max_num_batched_tokens - sum(len(running.next_tokens()) for running in self._running)
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            request = self._waiting[0]
            if request.arrival_step > step or len(request.prompt) > budget:
                break
            budget -= len(request.prompt)
            self._running.append(Running(self._waiting.popleft()))
        return list(self._running)

    def update(self, tokens: Sequence[Sequence[int]]) -> list[Running]:
        """Append the step's new tokens of each scheduled request; returns the requests that are complete."""
        complete = []
        for running, new in zip(self._running, tokens, strict=True):
            running.output.extend(new)
            if running.num_left <= 0:
                self.finished[running.request.request_id] = running.output
                complete.append(running)
        self._running = [running for running in self._running if running not in complete]
        return complete


def step_rows(requests_by_rank: Sequence[Sequence[Request]], config: EngineConfig) -> list[list[int]]:
    """For each serve step, the rows that each rank's requests bring, 0 for an idle rank, until all are idle.

    Exact without a model, and without drafts: greedy requests end by length alone.
    """
    schedulers = [Scheduler(requests, config) for requests in requests_by_rank]
    steps: list[list[int]] = []
    while any(scheduler.unfinished for scheduler in schedulers):
        rows = []
        for scheduler in schedulers:
            running = scheduler.schedule(len(steps))
            rows.append(sum(len(request.next_tokens()) for request in running))
            scheduler.update([[0]] * len(running))
        steps.append(rows)
    return steps


def live_ranks(requests_by_rank: Sequence[Sequence[Request]], config: EngineConfig) -> list[list[int]]:
    """For each serve step, the ranks that have live requests, until all are idle."""
    return [[rank for rank, rows in enumerate(step) if rows] for step in step_rows(requests_by_rank, config)]
