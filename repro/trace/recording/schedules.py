"""Store the schedules that a rank declares, each as one string of its witness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.trace.recording.calls import sealed_part
from repro.trace.witness.format import ENTRY_SEPARATOR, NO_GROUP, SEPARATOR, Kind

_MOST = 256


class Schedules:
    """Packs the first part of the record that begins a step, and keeps the packed bytes for later steps.

    A later step can use these bytes if it has the same schedule, number of live requests and phase. Two schedules count
    as the same only if they are one tuple object, because comparing all their entries would take longer.

    known  (id of the schedule, number of live requests, phase) -> (the schedule, (the packed bytes, their checksum))
    """

    def __init__(self, intern: Callable[[str], int]) -> None:
        self._intern = intern
        self.known: dict[tuple[int, int, int], tuple[Sequence[ScheduleEntry], tuple[bytes, int]]] = {}

    def part(self, schedule: Sequence[ScheduleEntry], num_live: int, phase: int) -> tuple[bytes, int]:
        """Return the first part of the record that begins a step, and the checksum of this part.

        If the schedule is new, store it as a string in the witness.

        num_live   number of live requests
        phase      the phase's name, as the index of a string in the witness's table of strings
        """
        key = id(schedule), num_live, phase
        known = self.known.get(key)
        if known is not None and known[0] is schedule:
            return known[1]
        string = self._intern(ENTRY_SEPARATOR.join(SEPARATOR.join((e.group, e.op, e.layer)) for e in schedule))
        part = sealed_part(num_live, 0, string, 0, phase, NO_GROUP, Kind.STEP)
        if isinstance(schedule, tuple):  # a tuple cannot change, so its id identifies the schedule
            if len(self.known) >= _MOST:
                self.known.clear()
            self.known[key] = (schedule, part)
        return part
