"""Learn the schedule of a model execution from the rank's earlier executions of the same kind.

vLLM declares no schedule. Its executions are equal as long as the ranks agree on the same graph mode and microbatches,
so a rank that has issued the same collectives three times in a row declares them for the next execution. An execution
that ends with other collectives than declared ends the declarations of its kind: the kind is not a habit.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from hybrid_moe_ref.parallel.observer import ScheduleEntry

if TYPE_CHECKING:
    from repro.trace.recording.recorder import Recorder

NUM_EQUAL = 3
"""Executions that must be equal before a rank declares them."""


class Habits:
    """The schedules that one rank repeats. Call all methods with the rank's lock held."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        # the collectives with which each execution begins; () before the first
        self.agreement: tuple[ScheduleEntry, ...] = ()
        self._issued: list[ScheduleEntry] | None = None  # the collectives since the execution began; None outside
        self._kind: Hashable = None
        # kind -> (entries, number of equal executions in a row)
        self._learnt: dict[Hashable, tuple[tuple[ScheduleEntry, ...], int]] = {}
        self._varying: set[Hashable] = set()

    def begin(self) -> None:
        """Start to record an execution."""
        self._issued, self._kind = [], None
        self._recorder.note_entries(self._issued)

    def plan(self, kind: Hashable) -> tuple[ScheduleEntry, ...]:
        """Return what an execution of this kind issues after the step agreement; () if that is unknown."""
        self._kind = kind
        entries, count = self._learnt.get(kind, ((), 0))
        return entries if count >= NUM_EQUAL else ()

    def end(self) -> None:
        """End an execution: compare it with earlier ones of its kind."""
        if self._issued is None:
            return
        issued, kind = tuple(self._issued[1:]), self._kind
        if self.agreement != (first := tuple(self._issued[:1])):
            self.agreement = first  # else the same object: the recorder knows the schedules that it has by identity
        self._issued = None
        self._recorder.note_entries(None)
        if kind is None or kind in self._varying:
            return
        entries, count = self._learnt.get(kind, (issued, 0))
        if issued == entries:
            self._learnt[kind] = entries, count + 1
        elif count < NUM_EQUAL:
            self._learnt[kind] = issued, 1
        else:
            self._varying.add(kind)
            del self._learnt[kind]
