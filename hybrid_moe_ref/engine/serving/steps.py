"""Plan the steps of one rank, and run those in which it has no requests."""

from __future__ import annotations

import torch

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.drafting import Drafting
from hybrid_moe_ref.engine.step.feed import DUMMY, Feed, feed_hash
from hybrid_moe_ref.engine.step.plan import EAGER, GRAPH, StepPlan, padded_size
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.parallel.observer import ScheduleEntry


class Steps:
    """Plans and runs the steps of one rank.

    The steps of an engine are numbered from 0, from its start on. A number means the same step on all ranks.
    """

    def __init__(self, config: ServerConfig, runner: ModelRunner, drafting: Drafting, device: torch.device) -> None:
        self._config = config
        self._runner = runner
        self._drafting = drafting
        self._device = device
        self._num_steps = 0

    def plan(
        self, feeds: list[Feed], num_live: int, asks_unfinished: bool = False, may_replay: bool = True
    ) -> StepPlan:
        """Return this rank's proposal for the next step.

        The rank proposes to replay a graph if a captured size is large enough for the step. It proposes to split the
        step if the step has at least `microbatch_tokens` tokens; if this setting is 0, it never does.

        feeds            the tokens of each request in the step, or of the dummy batch
        num_live         number of requests in the step; 0 for a dummy batch
        asks_unfinished  whether the step ends with the question "is anyone unfinished?"
        may_replay       whether the rank is allowed to propose a graph
        """
        engine, lengths = self._config.engine, tuple(len(feed.tokens) for feed in feeds)
        num_tokens = sum(lengths)
        padded = padded_size(num_tokens, engine.graph_sizes) if may_replay else None
        plan = StepPlan(
            self._num_steps,
            num_tokens,
            num_live,
            padded_tokens=padded or 0,
            mode=GRAPH if padded else EAGER,
            wants_microbatch=0 < engine.microbatch_tokens <= num_tokens,
            asks_unfinished=asks_unfinished,
            draft_rows=self._drafting.num_rows(num_live),
            feed_hash=feed_hash(feeds) if self._config.parallel.tp_size > 1 else 0,
            query_lengths=lengths,
        )
        self._num_steps += 1
        return plan

    def declare(self, schedule: tuple[ScheduleEntry, ...]) -> None:
        """Begin a step whose collectives are not those of the model, such as the step that tunes.

        schedule: the collectives that the caller will issue, in order
        """
        self._runner.declare(self.plan([], 0), schedule)

    @torch.inference_mode()
    def dummy(self, num_tokens: int, asks_unfinished: bool = False, may_replay: bool = True) -> None:
        """Run a step with dummy tokens, so that a rank without requests issues the same collectives as the others.

        asks_unfinished  whether the step ends with the question "is anyone unfinished?"
        may_replay       whether the rank is allowed to propose a graph
        """
        feeds = [Feed(DUMMY, 0, (0,) * num_tokens)]
        plan = self.plan(feeds, 0, asks_unfinished, may_replay)
        tokens_N = torch.zeros(num_tokens, dtype=torch.long, device=self._device)
        batch: Batch = Batch.dummy(num_tokens, self._device)
        hidden_NH = self._runner.execute(plan, tokens_N, batch, None, feeds)
        self._drafting.draft_dummy(tokens_N, hidden_NH, batch)
