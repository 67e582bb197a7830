"""The plan of one step: this rank's proposal, the step agreement of the ranks, and the resulting collectives.

This file only computes with integers; it uses neither torch nor communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hybrid_moe_ref.parallel.checks.schedule import schedule_hash
from hybrid_moe_ref.parallel.observer import ScheduleEntry

EAGER = 0
GRAPH = 1
"""Modes of a step: eager, without padding, or the replay of a graph, padded to the size of the graph. If one rank
proposes EAGER, all ranks run eagerly."""

STEP_AGREEMENT = "step"
ANYONE_UNFINISHED = "unfinished"
"""Names of two all-reduces in events: the first begins a step, the second asks whether any rank has work left."""

TUNING_VOTE = ScheduleEntry("ep", "all_reduce", "autotune.vote")

RECURRENT = {"G": "gated_delta_net", "M": "mamba2"}
"""The layer kinds with recurrent state, and their names in events."""


@dataclass(frozen=True)
class StepPlan:
    """One rank's proposal for a step, before the step agreement.

    step                 number of the model execution, the same on all ranks
    num_tokens           rows of this rank, or of its dummy batch
    num_live             number of requests in the step; 0 for a dummy batch
    padded_tokens        rows after padding to a graph's size; 0 for no padding
    mode                 GRAPH if this rank could replay a graph, otherwise EAGER
    wants_microbatch     whether this rank would split the step in two
    asks_unfinished      whether the step ends with the "anyone unfinished?" all-reduce
    schedule_hash        64-bit hash of the schedule that this rank is about to run
    draft_rows           rows of this rank in each later pass of the drafter; the first pass has `num_tokens` rows
    feed_hash            64-bit hash of the requests and tokens of this step, which must be equal on all ranks of a tp
                         group; 0 if tp_size is 1
    query_lengths        number of tokens of each request in this step, or of the dummy batch
    """

    step: int
    num_tokens: int
    num_live: int
    padded_tokens: int = 0
    mode: int = EAGER
    wants_microbatch: bool = False
    asks_unfinished: bool = False
    schedule_hash: int = 0
    draft_rows: int = 0
    feed_hash: int = 0
    query_lengths: tuple[int, ...] = ()


@dataclass(frozen=True)
class AgreedStep:
    """The result of the step agreement (C1). It is equal on every rank, and so is every decision that follows from it.

    sizes          rows of each dp rank, with padding if a graph is replayed
    mode           EAGER or GRAPH, for all ranks
    microbatch     whether the step is split in two
    same_schedule  whether all ranks that took part in the agreement are about to run the same schedule
    same_feed      whether the ranks of each tp group run the same tokens of the same requests
    draft_sizes    two tuples with the rows of each dp rank: in the drafter's first pass, which is never padded, and in
                   each later pass
    """

    sizes: tuple[int, ...]
    mode: int
    microbatch: bool
    same_schedule: bool = True
    same_feed: bool = True
    draft_sizes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def padded_size(num_tokens: int, sizes: Sequence[int]) -> int | None:
    """Return the smallest of the ascending `sizes` that is at least `num_tokens`; None if there is none."""
    return next((size for size in sizes if size >= num_tokens), None)


@dataclass(frozen=True)
class StepSchedules:
    """The schedules of one rank: for each kind of step, its collectives in order. Each schedule is computed once.

    group    the group whose ranks agree on a step
    forward  the collectives of one forward pass
    drafts   the collectives of all passes of the drafter

    Parameters of the methods:

    asks_unfinished   whether the step ends with the "anyone unfinished?" all-reduce
    microbatch        whether the step is split in two
    """

    group: str
    forward: tuple[ScheduleEntry, ...] = ()
    drafts: tuple[ScheduleEntry, ...] = ()

    @cached_property
    def agreement(self) -> tuple[ScheduleEntry, ...]:
        """Return the collective with which every step begins."""
        return (ScheduleEntry(self.group, "all_reduce", STEP_AGREEMENT),)

    def rest(self, asks_unfinished: bool, microbatch: bool) -> tuple[ScheduleEntry, ...]:
        """Return the collectives after the agreement.

        These are the collectives of the forward pass (twice with `microbatch`, because the step is then split in two),
        those of the drafter's passes, and with `asks_unfinished` the "anyone unfinished?" all-reduce.
        """
        return self._rests[asks_unfinished, microbatch]

    def whole(self, asks_unfinished: bool) -> tuple[ScheduleEntry, ...]:
        """Return all collectives of a step that is not split in two.

        asks_unfinished: whether the step ends with the "anyone unfinished?" all-reduce
        """
        return self._wholes[asks_unfinished]

    def hash(self, asks_unfinished: bool) -> int:
        """Return the 64-bit hash of `whole(asks_unfinished)`, all collectives of a step that is not split in two."""
        return self._hashes[asks_unfinished]

    @cached_property
    def _rests(self) -> dict[tuple[bool, bool], tuple[ScheduleEntry, ...]]:
        question = (ScheduleEntry(self.group, "all_reduce", ANYONE_UNFINISHED),)
        return {
            (asks, split): (*self.forward * (1 + split), *self.drafts, *question * asks)
            for asks in (False, True)
            for split in (False, True)
        }

    @cached_property
    def _wholes(self) -> dict[bool, tuple[ScheduleEntry, ...]]:
        return {asks: (*self.agreement, *self._rests[asks, False]) for asks in (False, True)}

    @cached_property
    def _hashes(self) -> dict[bool, int]:
        return {asks: schedule_hash(schedule) for asks, schedule in self._wholes.items()}


def first_recurrent_layer(layer_pattern: str) -> tuple[int, str] | None:
    """Return the first layer with recurrent state, as (index, name in events); None if there is no such layer.

    layer_pattern: a letter for the kind of each layer, as in `ModelConfig`
    """
    for index, kind in enumerate(layer_pattern):
        if kind in RECURRENT:
            return index, f"layers.{index}.{RECURRENT[kind]}"
    return None
