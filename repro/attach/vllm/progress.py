"""How far a worker of vLLM is: its phase, its model execution, and the schedules that it has learned."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.attach.record import compiled


@dataclass
class Progress:
    """How far a worker of vLLM is. The compiled library has a class with the same fields, which its hooks can read.

    phase      name of the phase of the rank
    step       number of the last step; -1 before the first
    live       number of this rank's requests in the model execution
    executing  whether the worker executes the model, with requests or as a dummy batch
    begun      whether the step of this execution has begun, that is, the execution has reached the step agreement
    agreement  the collectives with which each step begins (the step agreement); () before the first step
    kind       the kind of this step: what the ranks have agreed on, such as the graph mode; None before the agreement
    expected   all collectives of this step; None if they are not known
    plans      for each kind of step whose schedule is learned, a pair: the collectives after the agreement, and all
               collectives of the step. When the agreement changes, the second value is None until the next such step
    """

    phase: str = ""
    step: int = -1
    live: int = 0
    executing: bool = False
    begun: bool = False
    agreement: tuple[ScheduleEntry, ...] = ()
    kind: Hashable = None
    expected: list[ScheduleEntry] | None = None
    plans: dict[Hashable, tuple[tuple[ScheduleEntry, ...], list[ScheduleEntry] | None]] = field(default_factory=dict)


def make_progress() -> Progress:
    """Return the progress of a worker that has done nothing yet."""
    library: Any = compiled.load()
    return Progress() if library is None else library.Progress()
