"""The agreed schedule of a step as a guard: a collective that is not its next entry is refused before it is issued.

The comparison is local and costs no communication. A refusal is published in the store, so that ranks that already
wait in a collective stop too, with the same message, within a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from hybrid_moe_ref.parallel.schedule import entry_words

_HALT = "halt"

NUM_SHARED = len(ScheduleEntry._fields)
"""How many of the first fields of a collective a schedule has."""


class Stopped(RuntimeError):
    """Every rank stops, with the same type and message."""


class ScheduleMismatch(Stopped):
    """The ranks differ, or a rank differs from its own plan; raised instead of hanging, with the first difference."""


class PeerLost(Stopped):
    """The process of a rank is gone, so that the collectives it belongs to will never end."""


class CollectiveStalled(Stopped):
    """A collective did not end within the limit that the engine was given."""


class Halt:
    """How one rank stops all: the first error that is published counts, and every rank that looks finds it.

    store: shared by all ranks of the job; None for a rank without others, which publishes nothing.
    """

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store

    def tell(self, error: Stopped) -> Stopped:
        """Stop the others; returns the error that was published first, to be raised."""
        if self._store is None:
            return error
        text = f"{type(error).__name__}\n{error}"
        return _error(self._store.compare_set(_HALT, "", text).decode())

    def heard(self) -> Stopped | None:
        """The error that a rank published, or None while none did."""
        if self._store is None or not self._store.check([_HALT]):
            return None
        return _error(self._store.get(_HALT).decode())


def _error(text: str) -> Stopped:
    name, _, message = text.partition("\n")
    return {kind.__name__: kind for kind in (ScheduleMismatch, PeerLost, CollectiveStalled)}[name](message)


class ScheduleGuard:
    """Holds one rank to the schedule of its step; inactive until the first :meth:`begin`."""

    def __init__(self, rank: int, halt: Halt) -> None:
        self._rank = rank
        self._halt = halt
        self._schedule: Sequence[ScheduleEntry] | None = None
        self._next = 0
        self._step = -1
        self._sizes: dict[str, tuple[int, ...]] = {}

    def begin(self, step: int, schedule: Sequence[ScheduleEntry]) -> None:
        """A step begins with this schedule; the last step's must be used up.

        Raises ScheduleMismatch when a planned collective was never issued.
        """
        if self._schedule is not None and self._next < len(self._schedule):
            planned = entry_words(self._schedule[self._next])
            self._refuse(f"began step {step}, but its schedule of step {self._step} still had {planned} to come")
        self._step, self._schedule, self._next = step, schedule, 0
        self._sizes = {}

    def extend(self, schedule: Sequence[ScheduleEntry]) -> None:
        """The rest of the step, where it was known only after the ranks had agreed."""
        self._schedule = (*(self._schedule or ()), *schedule)

    def agree(self, group: str, sizes: Sequence[int]) -> None:
        """From here on the -v collectives of ``group`` must carry these sizes."""
        self._sizes[group] = tuple(sizes)

    def stop_others(self, error: Exception) -> None:
        """This rank fails for a reason of its own: make those that wait for it raise that reason too."""
        if not isinstance(error, Stopped):
            self._halt.tell(ScheduleMismatch(f"rank {self._rank} failed: {type(error).__name__}: {error}"))

    def leave(self) -> None:
        """The rank wants to issue no more steps, although the ranks have not agreed that all work is done.

        Raises ScheduleMismatch.
        """
        self._refuse(f"would leave after step {self._step}, but nobody has agreed that no rank has work left")

    def finish(self) -> None:
        """The last step is over, and what follows belongs to none.

        Raises ScheduleMismatch when a planned collective was never issued.
        """
        if self._schedule is not None and self._next < len(self._schedule):
            planned = entry_words(self._schedule[self._next])
            self._refuse(f"ended step {self._step}, but its schedule still had {planned} to come")
        self.release()

    def release(self) -> None:
        """What follows belongs to no schedule."""
        self._schedule = None

    def admit(self, collective: Collective) -> None:
        """Called before a collective is issued; moves on to the next entry.

        Raises ScheduleMismatch when it is not the one that the schedule has next, or its sizes are not the agreed.
        """
        schedule, index = self._schedule, self._next
        if schedule is None:
            return
        # A model of 60 layers comes here 120 times a step: compare as tuples, and sizes by identity first.
        if index >= len(schedule) or collective[:NUM_SHARED] != schedule[index]:
            planned = entry_words(schedule[index]) if index < len(schedule) else "no further collective"
            self._refuse(f"would issue {_issued(collective)} in step {self._step}, the schedule has {planned}")
        agreed = self._sizes.get(collective.group)
        if agreed is not None and collective.sizes is not agreed and collective.op.endswith("_v"):
            self._check_sizes(collective, agreed)
        self._next = index + 1

    def _check_sizes(self, collective: Collective, agreed: tuple[int, ...]) -> None:
        if collective.sizes != agreed:
            self._refuse(
                f"would issue {_issued(collective)} in step {self._step} with sizes {list(collective.sizes)}, "
                f"agreed are {list(agreed)}"
            )

    def _refuse(self, what: str) -> None:
        raise self._halt.tell(ScheduleMismatch(f"rank {self._rank} {what}"))


def collective_words(collective: Collective) -> str:
    """A collective as people read it, with its sizes."""
    return f"{_issued(collective)} with sizes {list(collective.sizes)}"


def _issued(collective: Collective) -> str:
    return entry_words(ScheduleEntry(collective.group, collective.op, collective.layer))
