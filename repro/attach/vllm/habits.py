"""The schedule of an execution: what the rank's earlier executions of the same kind have issued.

vLLM declares no schedule. Its executions are equal as long as the ranks agree on the same graph mode and microbatches,
so a rank that has issued the same collectives three times in a row declares them for the next execution. An execution
that ends with other collectives than declared ends the declarations of its kind: the kind is not a habit.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry

if TYPE_CHECKING:
    from repro.trace.recorder import Recorder

NUM_EQUAL = 3
"""Executions that must be equal before a rank declares them."""

MAX_ENTRIES = 4096


class Habits:
    """The habits of one rank. All methods are called with the rank's lock held."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.agreement: tuple[ScheduleEntry, ...] = ()  # what each execution begins with; () before the first
        self._issued: list[ScheduleEntry] | None = None  # since the execution began; None outside
        self._kind: Hashable = None
        self._learnt: dict[Hashable, tuple[tuple[ScheduleEntry, ...], int]] = {}  # kind -> entries, how often in a row
        self._varying: set[Hashable] = set()

    def begin(self) -> None:
        """An execution begins."""
        self._issued, self._kind = [], None
        enter = type(self._recorder).enter.__get__(self._recorder)

        def noted(collective: Collective, asynchronous: bool = False) -> None:
            if self._issued is not None and len(self._issued) < MAX_ENTRIES:
                self._issued.append(ScheduleEntry(*collective[:3]))
            enter(collective, asynchronous)

        self._recorder.enter = noted  # type: ignore[method-assign]

    def plan(self, kind: Hashable) -> tuple[ScheduleEntry, ...]:
        """What an execution of this kind issues after the step agreement; () if that is not known."""
        self._kind = kind
        entries, count = self._learnt.get(kind, ((), 0))
        return entries if count >= NUM_EQUAL else ()

    def end(self) -> None:
        """The execution is over: compare it with the ones before."""
        if self._issued is None:
            return
        issued, kind = tuple(self._issued[1:]), self._kind
        self.agreement = tuple(self._issued[:1])
        self._issued = None
        vars(self._recorder).pop("enter", None)
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
