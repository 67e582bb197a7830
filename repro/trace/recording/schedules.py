"""Store the schedules that a rank declares, each as one string of its witness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.trace.witness.format import ENTRY_SEPARATOR, SEPARATOR

_MOST = 256


class Schedules:
    """Remembers the string number of each declared schedule, so that a repeated schedule is not written again.

    A schedule that is a tuple is recognised by its id, which is faster than comparing its entries.
    """

    def __init__(self, intern: Callable[[str], int]) -> None:
        self._intern = intern
        self._known: dict[int, tuple[Sequence[ScheduleEntry], int]] = {}

    def intern(self, schedule: Sequence[ScheduleEntry]) -> int:
        """Return the number of the string that contains the schedule. Store the string if it is new."""
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
