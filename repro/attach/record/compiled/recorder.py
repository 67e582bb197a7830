"""A recorder that writes its events through the compiled writer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.attach.record import compiled
from repro.trace.recording import calls
from repro.trace.recording.recorder import Recorder
from repro.trace.recording.string_areas import Buffer
from repro.trace.witness.format import GUARD, LIVE_AT, Geometry, Identity

_library: Any = compiled.load()


def recorder_type() -> type[Recorder]:
    """Return the class of this process's recorder: CompiledRecorder if the compiled library exists, else Recorder."""
    return Recorder if _library is None else CompiledRecorder


class CompiledRecorder(Recorder):
    """A Recorder that writes its events by code in C.

    This code needs no lock of its own: while it writes an event, it holds the interpreter's lock.
    """

    def __init__(
        self, buffer: Buffer, writer: Identity, shape: Geometry, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(buffer, writer, shape, clock=clock)
        native_clock = None if clock is time.monotonic_ns else clock
        self.tape = _library.Tape(
            buffer, shape.ring_at, shape.vectors_at, LIVE_AT, GUARD, native_clock, self._store_vector,
            self._schedules.known, self._schedules.part,
        )  # fmt: skip

    def phase(self, name: str) -> None:
        super().phase(name)
        self.tape.phase = self._phase

    def begin_step(self, step: int, schedule: Sequence[ScheduleEntry], num_live: int) -> None:
        self.tape.begin_step(step, schedule, num_live)

    def enter(self, collective: Collective, asynchronous: bool = False) -> None:
        group_name, op, layer, sizes, dtype, reduce_op, root = collective
        try:
            frame = sys._getframe(self._depth)  # as in Recorder.enter
        except ValueError:
            frame = sys._getframe(1)
        key = (group_name, op, layer, dtype, reduce_op, root, len(sizes), id(frame.f_code), frame.f_lasti)
        call = self._calls.get(key) or self._call_from(sys._getframe(1), collective)
        self._entered, self._entered_call = collective, call
        self.tape.enter(call, asynchronous, self.tape.vector(tuple(map(int, sizes))))

    def leave(self, collective: Collective | None, ticket: int = 0, call: Any = None) -> None:
        call = self._entered_or(collective) if call is None else call
        self.tape.leave(call, ticket or call.group.seq)

    def wait(self, collective: Collective | None, ticket: int, call: Any = None) -> None:
        self.tape.wait(self._entered_or(collective) if call is None else call, ticket)

    def call_at(self, caller: FrameType, collective: Collective) -> tuple[Any, int]:
        """Find the call site of a collective, outwards from the frame ``caller``.

        Returns what the recorder keeps for this call site, and the number of frames from ``caller`` to it.
        """
        depth = self._depth
        call = self._call_from(caller, collective)
        found, self._depth = self._depth - 1, depth
        return call, found

    def note_entries(self, entries: list[ScheduleEntry] | None) -> None:
        self.tape.noted = entries

    def _entered_or(self, collective: Collective | None) -> Any:
        assert collective is not None, "either the collective or its call is given"
        return self._entered_call if collective is self._entered else self._call_of(collective)

    def _append(self, fixed: bytes, check: int, seq: int) -> None:
        self.tape.append(fixed, check, seq)

    @staticmethod
    def _new_group(index: int) -> Any:
        group = calls.Group(index)
        return _library.Group(group.index, group.last, group.left_word)

    def _new_call(
        self, group: Any, digest: bytes, num_sizes: int, entry: ScheduleEntry, fixed: Callable[[int], tuple[bytes, int]]
    ) -> Any:
        call = calls.Call(group, digest, num_sizes, entry, fixed)
        return _library.Call(group, digest, num_sizes, entry, (call.enter, call.leave, call.issue, call.wait))
