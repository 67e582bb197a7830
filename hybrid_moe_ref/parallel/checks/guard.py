"""The schedule guard: refuse a collective that is not the next entry of the step's schedule, before it is issued.

The comparison is local and needs no communication. The rank that refuses a collective publishes the error in the store
that all ranks share. So ranks that already wait in a collective stop, too, with the same message, within a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from hybrid_moe_ref.parallel.checks.schedule import entry_words
from hybrid_moe_ref.parallel.halt import Halt, ScheduleMismatch, Stopped
from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry

NUM_SHARED = len(ScheduleEntry._fields)
"""Number of fields of a schedule entry. A collective begins with the same fields."""


class ScheduleGuard:
    """Refuses a collective that is not the next entry of its rank's schedule. Inactive until :meth:`begin`."""

    def __init__(self, rank: int, halt: Halt) -> None:
        self._rank = rank
        self._halt = halt
        self._schedule: Sequence[ScheduleEntry] | None = None
        self._next = 0
        self._step = -1
        self._sizes: dict[str, tuple[int, ...]] = {}

    def begin(self, step: int, schedule: Sequence[ScheduleEntry]) -> None:
        """Begin a step with this schedule.

        Raises ScheduleMismatch if a planned collective of the previous step was never issued.
        """
        if self._schedule is not None and self._next < len(self._schedule):
            planned = entry_words(self._schedule[self._next])
            self._refuse(
                f"began step {step}, but had not issued {planned}, which its schedule of step {self._step} still had"
            )
        self._step, self._schedule, self._next = step, schedule, 0
        self._sizes = {}

    def extend(self, schedule: Sequence[ScheduleEntry]) -> None:
        """Append more entries to the step's schedule.

        If a step can be split in two, the entries after the step agreement are known only after this agreement.
        """
        self._schedule = (*(self._schedule or ()), *schedule)

    def agree(self, group: str, sizes: Sequence[int]) -> None:
        """Set the sizes that each all_gather_v and reduce_scatter_v of ``group`` must have in this step.

        sizes: ``sizes[r]`` is the number of rows of group rank r
        """
        self._sizes[group] = tuple(sizes)

    def stop_others(self, error: Exception) -> None:
        """Make the other ranks raise ScheduleMismatch with the text of `error`.

        Does nothing if `error` is a `Stopped`, the type of the errors that stop all ranks.
        """
        if not isinstance(error, Stopped):
            self._halt.publish(ScheduleMismatch(f"rank {self._rank} failed: {type(error).__name__}: {error}"))

    def refuse(self, mistake: str) -> NoReturn:
        """Raise ScheduleMismatch. Its message is "rank N", the number of this rank, followed by `mistake`.

        If the guard is active, every other rank raises this error, too. If the guard is inactive (always if
        checks="observe"), only this rank raises it.

        mistake: what this rank did wrong, such as "ended a replay, but ..."
        """
        if self._schedule is None:
            raise ScheduleMismatch(f"rank {self._rank} {mistake}")
        self._refuse(mistake)

    def leave(self) -> None:
        """Raise ScheduleMismatch on all ranks: this rank would stop serving, but the ranks have not agreed to stop."""
        self._refuse(f"would leave after step {self._step}, but the ranks have not agreed that no rank has work left")

    def finish(self) -> None:
        """End the current step and deactivate the guard, because the collectives that follow belong to no step.

        Raises ScheduleMismatch if a planned collective of the step was never issued.
        """
        if self._schedule is not None and self._next < len(self._schedule):
            planned = entry_words(self._schedule[self._next])
            self._refuse(f"ended step {self._step}, but had not issued {planned}, which its schedule still had")
        self.release()

    def release(self) -> None:
        """Deactivate the guard until the next `begin`. Unlike `finish`, do not check for missing collectives."""
        self._schedule = None

    def admit(self, collective: Collective) -> None:
        """Compare a collective with the next entry of the schedule before it is issued, and move on by one entry.

        Does nothing while the guard is inactive. Raises ScheduleMismatch if the collective is not that entry, or if its
        sizes are not the agreed sizes.
        """
        schedule, index = self._schedule, self._next
        if schedule is None:
            return
        # A model of 60 layers calls this 120 times per step, so tuples are compared, and sizes by identity first.
        if index >= len(schedule) or collective[:NUM_SHARED] != schedule[index]:
            planned = entry_words(schedule[index]) if index < len(schedule) else "no further collective"
            self._refuse(f"would issue {_issued(collective)} in step {self._step}, but the schedule has {planned}")
        agreed = self._sizes.get(collective.group)
        if agreed is not None and collective.sizes is not agreed and collective.op.endswith("_v"):
            self._check_sizes(collective, agreed)
        self._next = index + 1

    def _check_sizes(self, collective: Collective, agreed: tuple[int, ...]) -> None:
        if collective.sizes != agreed:
            self._refuse(
                f"would issue {_issued(collective)} in step {self._step} with sizes {list(collective.sizes)}, but the "
                f"agreed sizes are {list(agreed)}"
            )

    def _refuse(self, mistake: str) -> NoReturn:
        raise self._halt.publish(ScheduleMismatch(f"rank {self._rank} {mistake}"))


def collective_words(collective: Collective) -> str:
    """Format a collective: "ep all_gather_v of layers.0.moe with sizes [4, 0]"."""
    return f"{_issued(collective)} with sizes {list(collective.sizes)}"


def _issued(collective: Collective) -> str:
    return entry_words(ScheduleEntry(collective.group, collective.op, collective.layer))
