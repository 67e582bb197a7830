"""Learn the schedule of a model execution from the rank's earlier executions of the same kind.

vLLM declares no schedule. But executions of one kind (the same graph mode and microbatches) issue the same collectives.
So if a rank issued the same collectives in its last executions of one kind, it declares them for the next execution of
this kind. If such an execution ends with other collectives, the rank declares no further schedule for this kind.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.attach.vllm.progress import Progress
from repro.attach.vllm.repeated import Repeated

if TYPE_CHECKING:
    from repro.trace.recording.recorder import Recorder


class Habits:
    """Learns which collectives each kind of model execution issues on one rank (its schedules).

    The schedules are kept in ``progress``, the object with the rank's phase and step, which the hooks in C also read.

    Call all methods with the rank's lock held.
    """

    def __init__(self, recorder: Recorder, progress: Progress) -> None:
        self._recorder = recorder
        self._progress = progress
        self._learned: Repeated[ScheduleEntry] = Repeated()
        # the collectives since the execution began; None outside an execution
        self._issued: list[ScheduleEntry] | None = None

    def begin(self) -> tuple[ScheduleEntry, ...]:
        """Begin an execution of the model: learn from the execution before it, and start to note its collectives.

        Returns the collectives with which earlier executions began (the step agreement); () for the first execution.
        """
        progress = self._progress
        if self._issued is not None and self._issued == progress.expected:
            self._issued.clear()  # nothing to learn, and the recorder goes on with the same list
        else:
            if self._issued is not None:
                self._learn(self._issued)
            self._issued = []
            self._recorder.note_entries(self._issued)
        progress.kind = progress.expected = None
        return progress.agreement

    def plan(self, kind: Hashable) -> tuple[ScheduleEntry, ...]:
        """Note what the ranks have agreed on for the execution that has begun (``kind``), such as the graph mode.

        Returns the collectives that such an execution issues after the step agreement; () if they are not known.
        """
        plan, self._progress.expected = self._progress.plans.get(kind, ((), None))
        self._progress.kind = kind  # after the line above, which raises a TypeError if the kind has no hash
        return plan

    def end(self) -> None:
        """End the execution, if one has begun, and learn from its collectives."""
        if self._issued is not None:
            self._learn(self._issued)
            self._issued = None
            self._recorder.note_entries(None)

    def _learn(self, entries: list[ScheduleEntry]) -> None:
        """Learn the schedule of this kind of execution from an execution that has ended.

        entries: the collectives that it issued; the first is the step agreement
        """
        progress, plans = self._progress, self._progress.plans
        if progress.agreement != (first := tuple(entries[:1])):
            progress.agreement = first  # if equal, keep the old object: the recorder recognises a schedule by identity
            plans.update({kind: (plan, None) for kind, (plan, _) in plans.items()})
        if progress.kind is None:
            return
        self._learned.learn(progress.kind, entries[1:])
        if (plan := self._learned.of(progress.kind)) is None:
            plans.pop(progress.kind, None)
        else:
            plans[progress.kind] = plan, [*progress.agreement, *plan]
