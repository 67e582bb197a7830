"""The declared schedules of a rank, each stored as one string of its witness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.trace.witness.format import ENTRY_SEPARATOR, SEPARATOR

_MOST = 256


class Schedules:
    """The numbers of the strings of schedules. A tuple that is declared again is recognised without its text."""

    def __init__(self, intern: Callable[[str], int]) -> None:
        self._intern = intern
        self._known: dict[int, tuple[Sequence[ScheduleEntry], int]] = {}

    def intern(self, schedule: Sequence[ScheduleEntry]) -> int:
        """Return the number of a schedule's string."""
        known = self._known.get(id(schedule))
        if known is not None and known[0] is schedule:
            return known[1]
        text = ENTRY_SEPARATOR.join(SEPARATOR.join((e.group, e.op, e.layer)) for e in schedule)
        string = self._intern(text)
        if isinstance(schedule, tuple):  # a tuple cannot change, so its id identifies the schedule
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[id(schedule)] = (schedule, string)
        return string
