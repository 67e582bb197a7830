"""What one step is going to do: its plan, the collectives it will issue, and what the ranks agreed on.

Pure arithmetic on integers: no torch, no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybrid_moe_ref.parallel.observer import ScheduleEntry

EAGER = 0
GRAPH = 1
"""Modes of a step: eager, with the tokens as they are, or a graph that is replayed at a padded size. The ranks take the
lowest that one of them asks for."""

STEP_AGREEMENT = ScheduleEntry("dp", "all_reduce", "step")
ANYONE_UNFINISHED = ScheduleEntry("dp", "all_reduce", "unfinished")
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

    def row(self) -> list[int]:
        """This rank's column of C1: tokens, padded tokens, wants-microbatch, graph mode, the schedule's hash in four
        parts of 16 bits, so that the sum over columns of zeros stays exact in int32, and the drafter's rows.
        """
        parts = [self.schedule_hash >> shift & 0xFFFF for shift in (48, 32, 16, 0)]
        padded = max(self.num_tokens, self.padded_tokens)
        return [self.num_tokens, padded, int(self.wants_microbatch), self.mode, *parts, self.draft_rows]


@dataclass(frozen=True)
class AgreedStep:
    """What all ranks agreed on in C1; equal on every rank, so everything decided from it is decided alike.

    draft_sizes: rows of each rank in the drafter's first pass, which is never padded, and in those after it
    """

    sizes: tuple[int, ...]
    mode: int
    microbatch: bool
    same_schedule: bool = True
    draft_sizes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def resolve(rows: Sequence[Sequence[int]]) -> AgreedStep:
    """Turn the C1 matrix, int[9][dp], into one decision: mode is the MIN, and the sizes are padded to the MAX only
    when a graph is replayed (mode is not eager), else they stay uneven. Eager steps are split in two when all want it.
    """
    tokens, padded, wants_microbatch, modes, *hash_parts, draft_rows = rows
    mode = min(modes)
    sizes = tuple(tokens) if mode == EAGER else (max(padded),) * len(padded)
    same_schedule = len(set(zip(*hash_parts, strict=True))) <= 1
    draft_sizes = (tuple(tokens), tuple(draft_rows))
    return AgreedStep(sizes, mode, mode == EAGER and all(wants_microbatch), same_schedule, draft_sizes)


def step_schedule(
    forward: tuple[ScheduleEntry, ...], plan: StepPlan, drafts: tuple[ScheduleEntry, ...] = ()
) -> tuple[ScheduleEntry, ...]:
    """The ordered collectives of a step: one agreement, the forward pass, all passes of the drafter, and the question
    every so often."""
    return (STEP_AGREEMENT, *rest_of_schedule(forward, plan, False, drafts))


def rest_of_schedule(
    forward: tuple[ScheduleEntry, ...], plan: StepPlan, microbatch: bool, drafts: tuple[ScheduleEntry, ...] = ()
) -> tuple[ScheduleEntry, ...]:
    """What comes after the agreement; a step that is split in two has the forward pass twice."""
    question = (ANYONE_UNFINISHED,) if plan.asks_unfinished else ()
    return (*forward * (2 if microbatch else 1), *drafts, *question)


def first_recurrent_layer(layer_pattern: str) -> tuple[int, str] | None:
    """Index of the first layer that carries state, and its name in events; None where no layer does."""
    for index, kind in enumerate(layer_pattern):
        if kind in RECURRENT:
            return index, f"layers.{index}.{RECURRENT[kind]}"
    return None
