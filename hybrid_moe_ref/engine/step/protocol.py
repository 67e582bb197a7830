"""The integers that the ranks exchange in order to act alike, in the form that one of two vLLM versions uses.

The step agreement (C1) is an int32 matrix with one column for each rank, which one all-reduce (sum) fills. The question
"is anyone unfinished?" is an all-reduce at the end of some steps of a wave. A wave is one call of `Engine.serve`; its
steps count from 1.

    protocol  rows of C1                                                        question after steps     its all-reduce
    "0.20"    tokens, padded tokens, wants microbatch, graph mode               32, 64, 96, ...          max int32[1]
    "0.33"    tokens, graph mode, uniform tokens, longest query,                1, 16, 32, 48, ...       sum int32[2]
              allows microbatch, requests, allows to skip drafts

`engine.unfinished_interval` replaces the interval, which is 32 or 16. vLLM 0.24 to 0.28 have the rows and steps of
"0.20" and the all-reduce of "0.33"; 0.32 has the rows of "0.20", but the steps and the all-reduce of "0.33".

After the rows of the vLLM version, this engine adds rows of its own: one row with the size of the drafter's later
passes, four rows with the hash of the schedule, and four rows with the hash of the tp group's tokens. Two of vLLM's
values are constant here, because this engine never pauses and never skips drafts. This file uses neither torch nor
communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from hybrid_moe_ref.config import EngineConfig
from hybrid_moe_ref.engine.step.plan import EAGER, AgreedStep, StepPlan, padded_size


@dataclass(frozen=True)
class Protocol:
    """What the ranks exchange in one vLLM version, for the settings of an engine.

    rows      the names of the rows of the tensor that the step agreement C1 reduces, in order
    interval  number of steps between two questions "is anyone unfinished?"; if `engine.unfinished_interval` is set,
              that number is used instead
    question  the reduction, such as "max", of the all-reduce that asks this question
    """

    engine: EngineConfig

    rows: ClassVar[tuple[str, ...]]
    interval: ClassVar[int]
    question: ClassVar[str]

    def asks(self, step: int) -> bool:
        """Whether the ranks ask "is anyone unfinished?" after this step of a wave. Steps count from 1 in each wave."""
        return step % (self.engine.unfinished_interval or self.interval) == 0

    def last_step(self, num_steps: int) -> int:
        """Return the last step of a wave whose requests need `num_steps` steps.

        A wave ends only after the question "is anyone unfinished?", so a wave can have more steps than its requests
        need.
        """
        step = max(1, num_steps)
        while not self.asks(step):
            step += 1
        return step

    def answer(self, unfinished: bool) -> list[int]:
        """Return the numbers with which this rank answers the question "is anyone unfinished?"."""
        raise NotImplementedError

    def column(self, plan: StepPlan) -> list[int]:
        """Return a rank's column of the matrix of C1: first vLLM's numbers, then those that this engine adds.

        A hash takes four numbers of 16 bits each, because every number must fit into int32.
        """
        return [*self._column(plan), plan.draft_rows, *_parts(plan.schedule_hash), *_parts(plan.feed_hash)]

    def resolve(self, matrix: Sequence[Sequence[int]], tp_size: int = 1) -> AgreedStep:
        """Turn the matrix of C1 into the decision that is equal on all ranks.

        The step replays a graph if all ranks propose it. Then all ranks pad to the same size; otherwise each rank keeps
        its own number of tokens. An eager step is split in two if all ranks would split it.

        matrix   the result of the all-reduce, int[rows][ranks]: a column for each rank that took part in it
        tp_size  number of ranks of a tp group. Their columns are consecutive and have the same number of tokens, so the
                 result has one size for each tp group
        """
        rows = dict(zip(self.rows, matrix, strict=False))
        draft_rows, *hash_parts = matrix[len(self.rows) :]
        schedules, feeds = (list(zip(*parts, strict=True)) for parts in (hash_parts[:4], hash_parts[4:]))
        mode, sizes = min(rows["graph mode"]), tuple(rows["tokens"][::tp_size])
        return AgreedStep(
            sizes if mode == EAGER else (self._padded(rows),) * len(sizes),
            mode,
            microbatch=mode == EAGER and self._splits(rows),
            same_schedule=len(set(schedules)) <= 1,
            same_feed=all(len(set(feeds[first : first + tp_size])) <= 1 for first in range(0, len(feeds), tp_size)),
            draft_sizes=(sizes, tuple(draft_rows[::tp_size])),
        )

    def _column(self, plan: StepPlan) -> list[int]:
        raise NotImplementedError

    def _padded(self, rows: dict[str, Sequence[int]]) -> int:
        """Return the size to which all ranks pad a step that replays a graph. rows: each row of C1, by its name"""
        raise NotImplementedError

    def _splits(self, rows: dict[str, Sequence[int]]) -> bool:
        """Whether all ranks would split the step in two. rows: each row of C1, by its name"""
        raise NotImplementedError


class Protocol020(Protocol):
    """The protocol of vLLM 0.20.

    In C1 each rank sends the size to which it would pad its batch, and whether it would split the step in two.
    """

    rows = ("tokens", "padded tokens", "wants microbatch", "graph mode")
    interval = 32
    question = "max"

    def answer(self, unfinished: bool) -> list[int]:
        return [int(unfinished)]

    def _column(self, plan: StepPlan) -> list[int]:
        padded = max(plan.num_tokens, plan.padded_tokens)
        return [plan.num_tokens, padded, int(plan.wants_microbatch), plan.mode]

    def _padded(self, rows: dict[str, Sequence[int]]) -> int:
        return max(rows["padded tokens"])

    def _splits(self, rows: dict[str, Sequence[int]]) -> bool:
        return all(rows["wants microbatch"])


class Protocol033(Protocol):
    """The protocol of vLLM 0.33.

    In C1 each rank sends its number of tokens, and whether it allows to split the step in two. From the numbers of all
    ranks, every rank computes the size to which all ranks pad, and whether they split the step.
    """

    rows = (
        "tokens", "graph mode", "uniform tokens", "longest query", "allows microbatch", "requests",
        "allows to skip drafts",
    )  # fmt: skip
    interval = 16
    question = "sum"

    def asks(self, step: int) -> bool:
        return step == 1 or super().asks(step)

    def answer(self, unfinished: bool) -> list[int]:
        """Return two numbers: whether this rank has unfinished work, and whether it will pause, which is always 0."""
        return [int(unfinished), 0]

    def _column(self, plan: StepPlan) -> list[int]:
        lengths = plan.query_lengths
        uniform = len(set(lengths)) == 1 and lengths[0] <= 1 + self.engine.num_drafts
        return [
            plan.num_tokens, plan.mode, lengths[0] if uniform else 0, max(lengths, default=-1),
            int(self.engine.microbatch_tokens > 0), len(lengths), 0,
        ]  # fmt: skip

    def _padded(self, rows: dict[str, Sequence[int]]) -> int:
        size = padded_size(max(rows["tokens"]), self.engine.graph_sizes)
        assert size is not None, "every rank that proposes a graph has a size for its tokens"
        return size

    def _splits(self, rows: dict[str, Sequence[int]]) -> bool:
        return all(rows["allows microbatch"]) and min(rows["tokens"]) >= self.engine.microbatch_tokens


def protocol_of(engine: EngineConfig) -> Protocol:
    """Return the protocol that `engine.protocol` names."""
    return {"0.20": Protocol020, "0.33": Protocol033}[engine.protocol](engine)


def _parts(number: int) -> list[int]:
    return [number >> shift & 0xFFFF for shift in (48, 32, 16, 0)]
