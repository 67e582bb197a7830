"""Learn the schedule of a model execution from the rank's earlier executions of the same kind.

vLLM declares no schedule. Its executions issue the same collectives as long as the ranks agree on the same graph mode
and microbatches. So a rank that has issued the same collectives three times in a row declares them for the next
execution. If an execution ends with other collectives than declared, executions of this kind are no longer declared.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from hybrid_moe_ref.parallel.observer import ScheduleEntry

if TYPE_CHECKING:
    from repro.trace.recording.recorder import Recorder

NUM_EQUAL = 3
"""Number of equal executions in a row after which a rank declares the next one."""


class Habits:
    """The schedules that one rank has learned from its executions of the model.

    Call all methods with the rank's lock held.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        # the collectives with which each execution begins; () before the first
        self.agreement: tuple[ScheduleEntry, ...] = ()
        # the collectives since the execution began; None outside an execution
        self._issued: list[ScheduleEntry] | None = None
        self._kind: Hashable = None
        # kind -> (entries, number of equal executions in a row)
        self._learnt: dict[Hashable, tuple[tuple[ScheduleEntry, ...], int]] = {}
        self._varying: set[Hashable] = set()
        # all collectives of this execution, if they are known; and kind -> them
        self._expected: list[ScheduleEntry] | None = None
        self._known: dict[Hashable, list[ScheduleEntry]] = {}

    def begin(self) -> tuple[ScheduleEntry, ...]:
        """Begin an execution of the model, which ends the one before; start to note its collectives.

        Returns the collectives with which earlier executions began (the step agreement); () before the first one.
        """
        if self._issued is not None and self._issued == self._expected:
            self._issued.clear()  # nothing to learn, and the recorder goes on with the same list
        else:
            if self._issued is not None:
                self._learn(self._issued)
            self._issued = []
            self._recorder.note_entries(self._issued)
        self._kind = self._expected = None
        return self.agreement

    def plan(self, kind: Hashable) -> tuple[ScheduleEntry, ...]:
        """Note the kind of the execution that has begun.

        Returns what an execution of this kind issues after the step agreement; () if that is not known.
        """
        self._kind = kind
        entries, count = self._learnt.get(kind, ((), 0))
        if count < NUM_EQUAL:
            return ()
        known = self._known[kind]
        if known[:1] == [*self.agreement]:
            self._expected = known
        return entries

    def end(self) -> None:
        """End the execution, if one has begun, and learn from its collectives."""
        if self._issued is not None:
            self._learn(self._issued)
            self._issued = None
            self._recorder.note_entries(None)

    def _learn(self, entries: list[ScheduleEntry]) -> None:
        """Compare the collectives of an execution with those of earlier executions of its kind.

        If they are equal, count one more equal execution. If not, begin to count again; but if the schedule of this
        kind was already known, this kind is never learned again.
        """
        issued, kind = tuple(entries[1:]), self._kind
        if self.agreement != (first := tuple(entries[:1])):
            self.agreement = first  # if equal, keep the old object: the recorder recognises a schedule by identity
        if kind is None or kind in self._varying:
            return
        learnt, count = self._learnt.get(kind, (issued, 0))
        if issued == learnt:
            self._learnt[kind] = learnt, count + 1
            self._known[kind] = [*self.agreement, *learnt]
        elif count < NUM_EQUAL:
            self._learnt[kind] = issued, 1
        else:
            self._varying.add(kind)
            del self._learnt[kind], self._known[kind]
