"""Run one model execution on one rank: agree on the step, give the layers the agreed sizes, and run the model.

Shape suffixes: N tokens of this rank in the step, H hidden.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache
from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.step.feed import Feed, feed_differences, from_text, to_text
from hybrid_moe_ref.engine.step.graphs import Graphs, pad
from hybrid_moe_ref.engine.step.microbatch import halves, part_of
from hybrid_moe_ref.engine.step.plan import (
    ANYONE_UNFINISHED,
    STEP_AGREEMENT,
    AgreedStep,
    StepPlan,
    StepSchedules,
    first_recurrent_layer,
)
from hybrid_moe_ref.engine.step.protocol import protocol_of
from hybrid_moe_ref.layers.moe import MoE
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.checks.schedule import first_difference, schedule_words
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from hybrid_moe_ref.parallel.sharding.dispatch import ForwardContext


class ModelRunner:
    """Runs the steps of one rank. All ranks must execute the same steps in the same order.

    Each decision that the ranks must make alike is a call of one of `policies`, which a scenario can replace by a
    faulty policy. A policy that needs the step agreement gets it as a function (`_agree`, `_exchange`), and the policy
    decides whether to call this function.
    """

    def __init__(
        self, model: HybridMoE, context: ForwardContext, comm: Communicator, policies: Policies, config: ServerConfig
    ) -> None:
        self._model = model
        self._blocks = model.blocks
        self._context = context
        self._comm = comm
        self._policies = policies
        self._agree_on_schedules = config.checks != "observe"
        # With checks "observe" the ranks agree as in vLLM: the agreement does not compare the ranks of a tp group.
        self.agreeing = comm.everyone if self._agree_on_schedules else "dp"
        self._tp_size = config.parallel.tp_size if self._agree_on_schedules else 1
        self.protocol = protocol_of(config.engine)
        self.schedules = StepSchedules(
            self.agreeing, context.schedule, context.draft_schedule * config.engine.num_drafts
        )
        self._may_split = config.engine.microbatch_tokens > 0
        self.graphs = Graphs(model, comm)
        self._bind_at_first_recurrent_layer()

    def execute(
        self, plan: StepPlan, tokens_N: Tensor, batch: Batch, cache: HybridCache | None, feeds: Sequence[Feed] = ()
    ) -> Tensor:
        """Run one step. Returns hidden states, [tokens, hidden size].

        plan: this rank's proposal for the step
        tokens_N: token ids of this rank's batch
        cache: the cache of the batch's sequences; None for a dummy batch
        feeds: the tokens of each request in this step

        Raises ScheduleMismatch on every rank if the ranks' schedules differ, if the ranks of a tp group have different
        feeds, or if a rank departs from its schedule. With checks="observe", none of this is checked; but a replay
        that departs from its captured step still raises ScheduleMismatch on its own rank.
        """
        schedule = self.schedules.whole(plan.asks_unfinished)
        self._plan = dataclasses.replace(plan, schedule_hash=self.schedules.hash(plan.asks_unfinished))
        # A step that is split in two issues its collectives twice. Only the agreement decides whether it is split.
        self.declare(self._plan, self.schedules.agreement if self._may_split else schedule)
        self._agreed = self._agree(STEP_AGREEMENT)
        if self._agree_on_schedules and not self._agreed.same_schedule:
            self._raise_mismatch(schedule)
        if self._agree_on_schedules and not self._agreed.same_feed:
            self._raise_feed_mismatch(feeds)
        if self._may_split:
            rest = self.schedules.rest(plan.asks_unfinished, self._agreed.microbatch)
            self._comm.observer.begin_step(plan.step, rest, plan.num_live)
            if self._agree_on_schedules:
                self._comm.guard.extend(rest)
        if self._agreed.microbatch:
            return self._execute_halves(tokens_N, batch, cache)
        self._set_sizes(self._agreed.sizes)
        chosen = self._policies.graphs.choose(self._plan, self._agreed)
        self._context.sizes = chosen.sizes
        size = chosen.sizes[self._comm.group_rank("dp")]
        padded_N, padded = pad(tokens_N, batch, size)
        with self.graphs.running(chosen.mode, size):
            return self._model.step(padded_N, padded, cache)[: batch.num_tokens]

    def declare(self, plan: StepPlan, schedule: tuple[ScheduleEntry, ...]) -> None:
        """Begin a step with this schedule: report the schedule to the observer, and let the guard enforce it."""
        self._comm.observer.begin_step(plan.step, schedule, plan.num_live)
        if self._agree_on_schedules:
            self._comm.guard.begin(plan.step, schedule)

    def _set_sizes(self, sizes: tuple[int, ...]) -> None:
        """Tell the layers and the guard how many tokens each rank has. The guard refuses other sizes in C2 and C3."""
        self._context.sizes = sizes
        if self._agree_on_schedules:
            self._comm.guard.agree("ep", self._context.ep_sizes)

    def _execute_halves(self, tokens_N: Tensor, batch: Batch, cache: HybridCache | None) -> Tensor:
        """Run both halves of the step one after the other, with two dispatches and combines per layer."""
        hidden = []
        splits = [halves(size) for size in self._agreed.sizes]
        for index, half in enumerate(splits[self._comm.group_rank("dp")]):
            self._set_sizes(tuple(split[index].stop - split[index].start for split in splits))
            hidden.append(self._model.step(tokens_N[half.start : half.stop], part_of(batch, half), cache))
        return torch.cat(hidden)

    def draft(
        self, number: int, tokens_N: Tensor, hidden_NH: Tensor, batch: Batch, cache: HybridCache | None
    ) -> Tensor:
        """Run pass ``number`` (from 0) of the drafter. Its hidden states, [tokens, hidden size], give the drafts.

        tokens_N, hidden_NH: the tokens to continue, and the hidden state of the position before each token
        cache: the drafter's cache; None for a dummy batch
        """
        self._set_sizes(self._agreed.draft_sizes[min(number, 1)])
        return self._model.draft(tokens_N, hidden_NH, batch, cache)

    def leave(self) -> None:
        """Call this if this rank is about to stop serving before the ranks have agreed that no rank has work left.

        Raises ScheduleMismatch, because the other ranks would wait for this rank for ever. With checks="observe" the
        guard is off: then do nothing, so that the caller stops serving.
        """
        if self._agree_on_schedules:
            self._comm.guard.leave()

    def _raise_mismatch(self, schedule: tuple[ScheduleEntry, ...]) -> NoReturn:
        """Exchange the schedules of all ranks, and raise ScheduleMismatch with the first difference.

        All ranks have seen the mismatch and call this method, so they can communicate.
        """
        self._comm.guard.release()
        words = self._comm.all_gather_text(self.agreeing, "\n".join(schedule_words(schedule)), layer="mismatch")
        index, sides = first_difference([lines.splitlines() for lines in words])
        differences = "; ".join(f"{what} on ranks {ranks}" for what, ranks in sides.items())
        message = f"step {self._plan.step}: the schedules differ at entry {index}: {differences}"
        raise ScheduleMismatch(self._comm.stop_all(message))

    def _raise_feed_mismatch(self, feeds: Sequence[Feed]) -> NoReturn:
        """Exchange the feeds of all ranks, and raise ScheduleMismatch, which names the tp groups with different feeds.

        All ranks have seen the mismatch and call this method, so they can communicate.
        """
        self._comm.guard.release()
        texts = self._comm.all_gather_text(self.agreeing, to_text(feeds), layer="mismatch")
        differences = "; ".join(feed_differences([from_text(text) for text in texts], self._tp_size))
        message = f"step {self._plan.step}: the ranks of a tp group do not run the same tokens: {differences}"
        raise ScheduleMismatch(self._comm.stop_all(message))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run one layer of each kind, so that kernels compile, or fail to compile, before any rank communicates.

        Hooks of the layers can communicate, so this method does not call them. The layers run with one token and with
        two tokens, because decode and prefill are different kernels.
        """
        parameters = next(self._model.parameters())
        blocks = list({block.kind: block for block in self._blocks}.values()) + self._model.draft_blocks
        mixtures = [block.mlp for block in blocks if isinstance(block.mlp, MoE)][:1]
        for num_rows in (1, 2):
            x_NH = parameters.new_zeros(num_rows, self._model.config.hidden_size)
            batch: Batch = Batch.dummy(num_rows, parameters.device)
            for block in blocks:
                block.mixer.forward(x_NH, batch, None)
            for mixture in mixtures:
                mixture.experts.forward(x_NH, *mixture.gate.forward(x_NH))

    def _agree(self, layer: str) -> AgreedStep:
        return self._policies.agreement.agree(self._plan, self._exchange, layer)

    def _exchange(self, plan: StepPlan, layer: str) -> AgreedStep:
        """Make the step agreement C1: each rank fills its own column of a matrix, and one all-reduce adds the matrices.

        So every rank then has all columns.

        layer: the name of the all-reduce in events
        """
        column = torch.tensor(self.protocol.column(plan), dtype=torch.int32)
        matrix = torch.zeros(len(column), len(self._comm.members(self.agreeing)), dtype=torch.int32)
        matrix[:, self._comm.group_rank(self.agreeing)] = column
        return self.protocol.resolve(self._comm.all_reduce(self.agreeing, matrix, layer=layer).tolist(), self._tp_size)

    def anyone_unfinished(self, mine: bool) -> bool:
        """Return whether any rank has work left, by one all-reduce. mine: whether this rank has work left"""
        answer = torch.tensor(self.protocol.answer(mine), dtype=torch.int32)
        self._comm.all_reduce(self.agreeing, answer, self.protocol.question, layer=ANYONE_UNFINISHED)
        return bool(answer[0].item())

    def _bind_at_first_recurrent_layer(self) -> None:
        first = first_recurrent_layer(self._model.config.layer_pattern)
        if first is None:
            return
        index, layer = first

        def bind(module: nn.Module, args: Any) -> None:
            agreed = self._policies.binding.bind(self._plan, self._agreed, lambda: self._agree(layer))
            if agreed != self._agreed:
                self._context.sizes = agreed.sizes

        self._blocks[index].mixer.register_forward_pre_hook(bind)
