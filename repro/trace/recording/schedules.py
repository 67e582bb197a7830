"""Store the schedules that a rank declares, each as one string of its witness."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.trace.recording.calls import sealed_part
from repro.trace.witness.format import ENTRY_SEPARATOR, NO_GROUP, SEPARATOR, Kind

_MOST = 256


class Schedules:
    """Packs the first part of the record that begins a step. Later steps with an equal part use the packed bytes again.

    The part depends on the schedule, the number of live requests and the phase. Two schedules count as equal only if
    they are the same tuple object, because comparing all their entries would take longer.

    known  a dict from (id of the schedule, number of live requests, phase) to (the schedule, what `part` returned)
    """

    def __init__(self, intern: Callable[[str], int]) -> None:
        self._intern = intern
        self.known: dict[tuple[int, int, int], tuple[Sequence[ScheduleEntry], tuple[bytes, int]]] = {}

    def part(self, schedule: Sequence[ScheduleEntry], num_live: int, phase: int) -> tuple[bytes, int]:
        """Return the first part of the record that begins a step, and the checksum of this part.

        If the schedule is new, store it as a string in the witness.

        num_live   number of live requests
        phase      the number of the string in the witness that has the phase's name
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
