"""Record in a worker's witness what the engine and the front end of the same rank do.

The engine and the front end write what they do into files, which the worker reads. When a message of the engine
arrives, the worker records the questions "is anyone unfinished?" that the engine has asked the other engines since the
last record. While no message arrives, the worker's background thread records what the engine waits for: the answer to
such a question, or requests. If the engine waits for requests, the thread also records what the front end does.

So the witness has all waits of the rank in order, and its last event shows where the rank waits now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.vllm.habits import Habits
from repro.attach.vllm.processes.notes import FRONT, Activity, Note, Notes, open_notes
from repro.attach.vllm.progress import Progress

if TYPE_CHECKING:
    from repro.attach.record.rank import Rank

GROUP = "engines"
"""The group of the EngineCore processes. Each engine has the rank of its first worker."""

QUESTION = Collective(GROUP, "all_reduce", "unfinished", (), "int32")
WITHOUT_REQUESTS = "idle, engine waits for requests"
"""The phase of an idle worker whose engine has no work. No collective follows until the engine gets a message.

If the front end does something that is in the table FRONT_ENDS, the phase's name ends with the text of this table.
"""

FRONT_ENDS = {
    Activity.WAITS_FOR_OUTPUTS: ", front end waits for outputs",
    Activity.EXITS: ", front end waits at exit",
}

LEFT_OUT = "engine left out execution"
"""The phase after steps that the engine counted but did not request. Its name ends with the number of the first one."""

_ANSWERED, _ASKED = Note.ANSWERED.value, Note.ASKED.value  # read at each message, and an enum takes time to read

IDLE_NS = 200_000_000
"""A worker that has waited for its engine this long (ns) is idle. Between two steps it waits about a millisecond."""


class Mirror:
    """Records in the witness of a worker what the worker's engine does. The worker is the first worker of its engine.

    Call all methods with the rank's lock held, because the background thread can record at any time.

    progress       how far the worker is
    habits         learns the collectives of the worker's executions
    first_workers  the rank of each engine's first worker; the witness shows these ranks as the members of the group of
                   engines
    since_ns       when the worker began to wait for a message of its engine (time.monotonic_ns); 0 if it does not wait
    """

    def __init__(self, rank: Rank, progress: Progress, habits: Habits, first_workers: Sequence[int]) -> None:
        self._rank = rank
        self._progress = progress
        self._habits = habits
        self._notes: Notes | None = None
        self._front: Notes | None = None
        self._asked = 0  # number of questions in the witness
        self._open = False  # whether the last question is still unanswered
        self._skipped = 0
        self._idle = ""  # the phase that was recorded for an idle worker
        self.since_ns = 0
        rank.recorder.groups({GROUP: first_workers})

    def woken(self) -> None:
        """Note that a message of the engine has arrived, so that the worker is not idle.

        Also record the questions "is anyone unfinished?" that the engine has asked the other engines since the last
        record.
        """
        self.since_ns = 0
        if self._idle:
            self._idle = ""
            self._rank.recorder.phase(self._progress.phase)
        notes = self._notes
        if notes is None or self._open or notes.numbers[_ASKED] != self._asked:
            self.catch_up()

    def note_idle(self) -> None:
        """If the worker is idle, record what its engine waits for.

        The engine can wait for the other engines' answer to "is anyone unfinished?", or for requests. If it waits for
        neither, record that the worker waits for the engine. A worker is idle if it has waited for a message of its
        engine for IDLE_NS nanoseconds.
        """
        if not self.since_ns or time.monotonic_ns() - self.since_ns < IDLE_NS:
            return
        self.catch_up()
        if self._notes is None or self._open:
            return
        without_requests = self._notes[Note.ACTIVITY] == Activity.WAITS_FOR_REQUESTS
        idle = WITHOUT_REQUESTS + self._front_end() if without_requests else "idle, waits for engine"
        if idle != self._idle:
            self._idle = idle
            self._rank.recorder.phase(idle)

    def _front_end(self) -> str:
        """Return the end of the name of an idle worker's phase, such as ", front end waits for outputs".

        Returns "" if the front end does nothing that is in the table FRONT_ENDS, or if it is not known what it does.
        """
        if self._front is None:
            self._front = open_notes(Path(self._rank.root), self._rank.rank, FRONT)
        return FRONT_ENDS.get(Activity(self._front[Note.ACTIVITY]), "") if self._front is not None else ""

    def catch_up(self) -> None:
        """Record each question "is anyone unfinished?" that the engine has asked since the last record.

        The engine asks the other engines. Each question is recorded as a collective that belongs to no step.
        """
        if self._notes is None:
            self._notes = open_notes(Path(self._rank.root), self._rank.rank)
            if self._notes is None:
                return
        notes, recorder = self._notes, self._rank.recorder
        answered = notes.numbers[_ANSWERED]
        asked = max(answered, notes.numbers[_ASKED])
        if self._open and answered >= self._asked:
            recorder.leave(QUESTION, self._asked)
            self._open = False
        if asked == self._asked:
            return
        self._habits.end()  # a question is not part of an execution
        self._declare_left_out(notes)
        recorder.phase(self._progress.phase)
        self._idle = ""
        while self._asked < asked:
            recorder.enter(QUESTION)
            self._asked += 1
            self._open = self._asked > answered
            if not self._open:
                recorder.leave(QUESTION, self._asked)

    def _declare_left_out(self, notes: Notes) -> None:
        """Record each step that the engine counted although it requested no execution for it from its worker.

        Such a step is declared with the step agreement as its schedule. No agreement is recorded for it, so the judge
        sees that this rank left the agreement out.

        notes: the numbers that the engine writes about itself, such as how many steps it did not request
        """
        skipped, first = notes[Note.SKIPPED], notes[Note.FIRST]
        while self._skipped < skipped:
            self._skipped += 1
            self._progress.step += 1
            self._rank.recorder.begin_step(self._progress.step, self._progress.agreement, 0)
            self._rank.recorder.phase(f"{LEFT_OUT} {first}")
