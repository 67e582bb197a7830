"""What one step is going to do: its plan, the collectives it will issue, and what the ranks agreed on.

Pure arithmetic on integers: no torch, no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from hybrid_moe_ref.parallel.schedule import schedule_hash

EAGER = 0
GRAPH = 1
"""Modes of a step: eager, with the tokens as they are, or a graph that is replayed at a padded size. The ranks take the
lowest that one of them asks for."""

STEP_AGREEMENT = "step"
ANYONE_UNFINISHED = "unfinished"
"""How events name the all-reduce that begins a step, and the one that asks whether any rank has work left."""

TUNING_VOTE = ScheduleEntry("ep", "all_reduce", "autotune.vote")

RECURRENT = {"G": "gated_delta_net", "M": "mamba2"}
"""Layer kinds that carry state from token to token, and how events name them."""


@dataclass(frozen=True)
class StepPlan:
    """What one rank wants of a step, before it knows the others.

    step                 number of the model execution, counted alike on all ranks
    num_tokens           rows this rank brings; a rank with nothing scheduled brings a dummy batch of one
    num_live             requests among them; 0 for a dummy batch
    padded_tokens        rows it would bring to a graph; 0 for no more than its own
    mode                 graph mode this rank could run
    wants_microbatch     whether this rank would split the step in two
    asks_unfinished      whether the step ends with the "anyone unfinished?" all-reduce
    schedule_hash        64 bits of the schedule that this rank is about to run
    draft_rows           rows this rank brings to each pass of the drafter after its first, which has the step's rows
    feed_hash            64 bits of the requests and tokens of this step, which the ranks of one tp group share; 0
                         where every rank has requests of its own
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

    def row(self) -> list[int]:
        """This rank's column of C1: tokens, padded tokens, wants-microbatch, graph mode, the drafter's rows, and the
        hashes of schedule and feed in four parts of 16 bits each, so that a sum over columns of zeros stays exact in
        int32.
        """
        padded = max(self.num_tokens, self.padded_tokens)
        numbers = [self.num_tokens, padded, int(self.wants_microbatch), self.mode, self.draft_rows]
        return [*numbers, *_parts(self.schedule_hash), *_parts(self.feed_hash)]


@dataclass(frozen=True)
class AgreedStep:
    """What all ranks agreed on in C1; equal on every rank, so everything decided from it is decided alike.

    sizes          rows of each dp rank
    same_schedule  whether all ranks that agreed are about to run the same schedule
    same_feed      whether the ranks of each tp group run the same tokens of the same requests
    draft_sizes    rows of each dp rank in the drafter's first pass, which is never padded, and in those after it
    """

    sizes: tuple[int, ...]
    mode: int
    microbatch: bool
    same_schedule: bool = True
    same_feed: bool = True
    draft_sizes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def resolve(rows: Sequence[Sequence[int]], tp_size: int = 1) -> AgreedStep:
    """Turn the C1 matrix, int[13][ranks that agree], into one decision: mode is the MIN, and the sizes are padded to
    the MAX only when a graph is replayed (mode is not eager), else they stay uneven. Eager steps are split in two when
    all want it.

    tp_size: so many columns after one another are of one tp group, which brings its rows once
    """
    tokens, padded, wants_microbatch, modes, draft_rows, *hash_parts = rows
    schedules, feeds = (list(zip(*parts, strict=True)) for parts in (hash_parts[:4], hash_parts[4:]))
    mode = min(modes)
    sizes = tuple(tokens[::tp_size])
    return AgreedStep(
        sizes if mode == EAGER else (max(padded),) * len(sizes),
        mode,
        microbatch=mode == EAGER and all(wants_microbatch),
        same_schedule=len(set(schedules)) <= 1,
        same_feed=all(len(set(feeds[first : first + tp_size])) <= 1 for first in range(0, len(feeds), tp_size)),
        draft_sizes=(sizes, tuple(draft_rows[::tp_size])),
    )


def _parts(number: int) -> list[int]:
    return [number >> shift & 0xFFFF for shift in (48, 32, 16, 0)]


@dataclass(frozen=True)
class StepSchedules:
    """The collectives that each kind of step of one rank issues, in order. Each is made once.

    group    the ranks that agree on a step
    forward  those of one forward pass
    drafts   those of all passes of the drafter
    """

    group: str
    forward: tuple[ScheduleEntry, ...] = ()
    drafts: tuple[ScheduleEntry, ...] = ()

    @cached_property
    def agreement(self) -> tuple[ScheduleEntry, ...]:
        """What every step begins with."""
        return (ScheduleEntry(self.group, "all_reduce", STEP_AGREEMENT),)

    def rest(self, asks_unfinished: bool, microbatch: bool) -> tuple[ScheduleEntry, ...]:
        """What comes after the agreement: the forward pass, twice where the step is split in two, the passes of the
        drafter, and the question every so often."""
        return self._rests[asks_unfinished, microbatch]

    def whole(self, asks_unfinished: bool) -> tuple[ScheduleEntry, ...]:
        """A step that is not split in two."""
        return self._wholes[asks_unfinished]

    def hash(self, asks_unfinished: bool) -> int:
        """64 bits of `whole`."""
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
    """Index of the first layer that carries state, and its name in events; None where no layer does."""
    for index, kind in enumerate(layer_pattern):
        if kind in RECURRENT:
            return index, f"layers.{index}.{RECURRENT[kind]}"
    return None
