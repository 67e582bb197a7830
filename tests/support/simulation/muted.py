"""A recorder that leaves out one aspect of what is reported to it, and says so in its header."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from repro.trace.knowledge import Knows
from repro.trace.recording.recorder import Recorder
from repro.trace.witness.format import pack_header

ALSO = {Knows.STEPS: Knows.SCHEDULE, Knows.ORDER: Knows.COMPLETION}
"""Aspect -> another aspect that a recorder without it lacks, too: without steps it has no schedules, and so on."""


class Muted:
    """Passes all calls on to the recorder, except for the aspects in `hidden`."""

    def __init__(self, recorder: Recorder, hidden: Knows) -> None:
        for aspect, other in ALSO.items():
            hidden |= other if aspect in hidden else hidden
        self._recorder, self._hidden = recorder, hidden
        recorder._writer = replace(recorder._writer, knows=recorder._writer.knows & ~hidden)
        header = pack_header(recorder._writer, recorder.shape)
        recorder._buffer[: len(header)] = header
        if Knows.TIME in hidden:
            recorder._clock = lambda: 1
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorder, name)

    def _shown(self, call: Any) -> Any:
        if Knows.ARGUMENTS in self._hidden:
            root = call.root if call.op in ("send", "recv") else -1
            call = call._replace(sizes=(), dtype="", reduce_op="", root=root)
        return call._replace(layer="") if Knows.LAYERS in self._hidden else call

    def _is_lost(self) -> bool:
        """Whether to drop this call.

        If the order is hidden, every third call is dropped, so that numbers mean nothing.
        """
        self._calls += 1
        return Knows.ORDER in self._hidden and self._calls % 3 == 0

    def begin_step(self, step: int, schedule: Any, num_live: int) -> None:
        if Knows.STEPS in self._hidden:
            return
        plan = () if Knows.SCHEDULE in self._hidden else tuple(schedule)
        hides_layers = Knows.LAYERS in self._hidden
        self._recorder.begin_step(step, tuple(e._replace(layer="") for e in plan) if hides_layers else plan, num_live)

    def enter(self, call: Any) -> None:
        if not self._is_lost():
            self._recorder.enter(self._shown(call))

    def issue(self, call: Any) -> int:
        return 0 if self._is_lost() else self._recorder.issue(self._shown(call))

    def wait(self, call: Any, ticket: int) -> None:
        if not self._is_lost():
            self._recorder.wait(self._shown(call), ticket)

    def leave(self, call: Any) -> None:
        if Knows.COMPLETION not in self._hidden:
            self._recorder.leave(self._shown(call))

    def finish(self, call: Any, ticket: int) -> None:
        if Knows.COMPLETION not in self._hidden:
            self._recorder.finish(self._shown(call), ticket)

    def local(self, event: str, name: str, holder: int = -1) -> None:
        if Knows.LOCKS not in self._hidden or event == "heartbeat":
            self._recorder.local(event, name, holder)
