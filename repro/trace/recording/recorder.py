"""Record what one rank does in its witness file, at about a microsecond per event.

    recorder = Recorder.open("events/rank003.wit", rank=3, num_ranks=8, run_id="…")
    comm = Communicator(…, observer=recorder)

The layout of the file is described in :mod:`repro.trace.witness.format`. The recorder never reads the file, and it
allocates no disk blocks after ``open``. The areas of the file have a fixed size, and a full area raises no error: if
the area of strings is full, readers see "?" for a new string; if all slots of groups are in use, the progress of a new
group is not stored.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import CodeType, FrameType
from zlib import crc32

from hybrid_moe_ref.parallel.observer import Collective, ScheduleEntry
from repro.trace.knowledge import WITNESS, Knows
from repro.trace.recording.call_site import is_between
from repro.trace.recording.calls import Call, Group, sealed_part
from repro.trace.recording.groups import Groups
from repro.trace.recording.mapping import map_file
from repro.trace.recording.schedules import Schedules
from repro.trace.recording.string_areas import Buffer, Strings, Vectors
from repro.trace.witness.format import (
    GROUP_BYTES,
    GROUPS_AT,
    GUARD,
    HEART,
    HEART_AT,
    LIVE_AT,
    NO_GROUP,
    NO_VECTOR,
    RECORD,
    SEALED,
    SEPARATOR,
    VARIABLE,
    WORD,
    Geometry,
    Identity,
    Kind,
    pack_heartbeat,
)

MAX_MESSAGE = 600
"""Maximum number of characters of an error message that the recorder writes for a failed rank."""

MAX_NOTED = 4096
"""Maximum number of entries that `Recorder.note_entries` appends to a list."""

_pack, _seal_into, _getframe = VARIABLE.pack, SEALED.pack_into, sys._getframe
_RECORD = RECORD.size
_NUM_EVENTS = LIVE_AT // WORD.size  # index of the word that counts the events; the count of groups is 3 words later
_LOCAL_KINDS = {
    "lock_wait": Kind.LOCK_WAIT,
    "lock_held": Kind.LOCK_HELD,
    "lock_freed": Kind.LOCK_FREED,
    "build_begin": Kind.BUILD_BEGIN,
    "build_end": Kind.BUILD_END,
}
_POINT_TO_POINT = ("send", "recv")


def _move_within(buffer: bytearray, target: int, source: int, count: int) -> None:
    """Copy ``count`` bytes within a bytearray, from offset ``source`` to ``target``, as ``mmap.move`` does.

    Tests record into a bytearray in place of a mapped file.
    """
    buffer[target : target + count] = buffer[source : source + count]


class Recorder:
    """An :class:`hybrid_moe_ref.parallel.observer.Observer` that writes one witness file.

    Only one thread is allowed to record. A second thread is allowed to call ``local("heartbeat", name)``. This is safe:
    the call writes only the heartbeat, which has its own place in the file, and, under a lock, the string ``name``.
    """

    def __init__(
        self, buffer: Buffer, writer: Identity, shape: Geometry, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.shape = shape
        self._buffer = buffer
        self._writer = writer
        self._words = memoryview(buffer).cast("B")[: GROUPS_AT + shape.group_slots * GROUP_BYTES].cast("Q")
        self._move = buffer.move if isinstance(buffer, mmap.mmap) else partial(_move_within, buffer)
        self._clock = clock
        self._num_events = 0
        self._entered: Collective | None = None  # the collective that was issued last, and its `Call`
        self._entered_call: Call | None = None
        self._phase = 0
        self._step = -1
        self._ring_at = self._next_at = shape.ring_at
        self._ring_end = shape.vectors_at
        self._intern = Strings(buffer, shape).intern
        self._store_vector = Vectors(buffer, shape).store
        self._groups = Groups(buffer, shape, self._intern, writer.num_ranks, self._new_group)
        self._calls: dict[tuple[object, ...], Call] = {}  # the calls of this phase: their packed bytes contain it
        self._calls_of_phase = {0: self._calls}
        self._schedules = Schedules(self._intern)
        self._depth = 1  # number of frames between `enter` and the call site at the previous call
        self._codes: list[CodeType] = []  # a reference to each code object, so that no id in _calls is used again
        self._vector: tuple[int, ...] = ()  # the size vector that was stored last, and its offset
        self._vector_offset = NO_VECTOR
        self._heartbeats = 0

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        rank: int,
        num_ranks: int,
        *,
        run_id: str = "",
        shape: Geometry | None = None,
        knows: Knows = WITNESS,
    ) -> Recorder:
        """Open the witness file of a rank for writing. If the launcher has not created the file, create it.

        run_id  the id of the run; "" keeps the id that the launcher wrote into the file
        shape   for a new file: how many events, sizes, strings and groups it has room for; None: the usual room
        knows   what this recorder writes, such as steps and locks (see `repro.trace.knowledge`). The judge concludes
                nothing from the absence of the rest

        Raises WitnessError if the file already has a writer, or was made for another rank.
        """
        return cls(*map_file(path, rank, num_ranks, run_id=run_id, shape=shape, knows=knows))

    # -- the Observer protocol -----------------------------------------------------------------------------------

    def groups(self, members: Mapping[str, Sequence[int]]) -> None:
        for name, ranks in members.items():
            self._groups.declare(name, ranks)

    def phase(self, name: str) -> None:
        self._phase = phase = self._intern(name)
        self._calls = self._calls_of_phase.setdefault(phase, {})
        self._entered = None
        self._write(Kind.PHASE)

    def begin_step(self, step: int, schedule: Sequence[ScheduleEntry], num_live: int) -> None:
        self._step = step
        self._append(*self._schedules.part(schedule, num_live, self._phase), 0)

    # `enter` and `leave` run hundreds of times in a step. They call no helper functions, because each Python call makes
    # them a tenth slower.

    def enter(self, collective: Collective, asynchronous: bool = False) -> None:
        group_name, op, layer, sizes, dtype, reduce_op, root = collective
        try:
            # Examining a frame takes time, so start at the depth at which the previous call found its call site.
            frame = _getframe(self._depth)
        except ValueError:  # the stack has fewer frames
            frame = _getframe(1)
        code = id(frame.f_code)
        call = self._calls.get((group_name, op, layer, dtype, reduce_op, root, len(sizes), code, frame.f_lasti))
        if call is None:
            call = self._call_from(_getframe(1), collective)
        self._entered, self._entered_call = collective, call
        if call.num_sizes == 1:
            vector = sizes[0]
        elif sizes is self._vector or sizes == self._vector:
            vector = self._vector_offset
        else:
            vector = self._store_vector(sizes)
            if vector != NO_VECTOR:
                self._vector, self._vector_offset = sizes, vector
        group = call.group
        group.seq = seq = group.seq + 1
        group.hash = rolling = crc32(call.digest, group.hash)
        self._num_events = n = self._num_events + 1
        fixed, check = call.issue if asynchronous else call.enter
        words, at = self._words, self._next_at
        end = at + _RECORD
        self._next_at = end if end != self._ring_end else self._ring_at
        row = _pack(n, self._clock(), seq, vector, self._step, rolling)
        _seal_into(self._buffer, at, fixed, row, crc32(row, check))
        # Copy the record. Packing it into the slot would first clear the slot, and a reader must not see it empty.
        self._move(group.last, at, _RECORD)
        words[_NUM_EVENTS] = n * GUARD

    def leave(self, collective: Collective | None, ticket: int = 0, call: Call | None = None) -> None:
        """Record that a collective is complete.

        collective   the collective; None is allowed if `call` is given
        ticket       for an asynchronous collective: what `issue` returned; 0 means the collective that was issued last
                     in its group
        call         what `last_call` returned directly after the collective was issued; if None, the recorder finds the
                     `Call` by ``collective``, which takes longer
        """
        if call is None:
            call = self._entered_call if collective is self._entered else None
            if call is None:
                call = self._call_of(collective)
        group = call.group
        seq = ticket or group.seq
        self._num_events = n = self._num_events + 1
        at = self._next_at
        end = at + _RECORD
        self._next_at = end if end != self._ring_end else self._ring_at
        fixed, check = call.leave
        row = _pack(n, self._clock(), seq, 0, self._step, 0)
        _seal_into(self._buffer, at, fixed, row, crc32(row, check))
        words = self._words
        if seq > group.left:
            group.left = seq
            words[group.left_word] = seq * GUARD
        words[_NUM_EVENTS] = n * GUARD

    def local(self, event: str, name: str, holder: int = -1) -> None:
        if event == "heartbeat":
            self._heartbeats += 1
            self._buffer[HEART_AT : HEART_AT + HEART.size] = pack_heartbeat(
                self._clock(), self._intern(name), self._heartbeats
            )
        else:
            self._write(_LOCAL_KINDS[event], sig=self._intern(name), aux=holder)

    def done(self) -> None:
        self._write(Kind.DONE)

    def failed(self, message: str) -> None:
        """Record that the rank has failed with an error.

        The witness gets the message as one line of at most MAX_MESSAGE characters. The rank's log has the whole
        message.
        """
        line = " ".join(message.split())
        line = line if len(line) <= MAX_MESSAGE else f"{line[: MAX_MESSAGE - 2]} …"
        self._write(Kind.FAILED, sig=self._intern(line))

    @property
    def last_call(self) -> Call:
        """The prepared records of the collective that was issued last, for the argument ``call`` of `leave` and `wait`.

        With this argument the two methods are faster.
        """
        assert self._entered_call is not None
        return self._entered_call

    @property
    def last_seq(self) -> int:
        """Return the sequence number, in its group, of the collective that was issued last."""
        assert self._entered_call is not None
        return self._entered_call.group.seq

    # -- asynchronous collectives --------------------------------------------------------------------------------

    def issue(self, collective: Collective) -> int:
        """Record that an asynchronous collective is issued now.

        Returns a ticket, its number in its group, for ``wait`` and ``finish`` of this collective.
        """
        self.enter(collective, True)
        return self.last_seq

    def wait(self, collective: Collective | None, ticket: int, call: Call | None = None) -> None:
        """Record that the rank begins to wait for an asynchronous collective.

        collective   the collective; None is allowed if `call` is given
        ticket       what `issue` returned
        call         what `last_call` returned directly after the collective was issued; if None, the recorder finds the
                     `Call` by ``collective``, which takes longer
        """
        self._append(*(call or self._call_of(collective)).wait, ticket)

    def finish(self, collective: Collective, ticket: int) -> None:
        """Record that an asynchronous collective is complete. ticket: what `issue` returned for it."""
        self.leave(collective, ticket)

    def note_entries(self, entries: list[ScheduleEntry] | None) -> None:
        """From now on, append (group, operation, layer) of each issued collective to ``entries``.

        The list gets at most MAX_NOTED entries. A second call replaces the list; None ends the appending.
        """
        vars(self).pop("enter", None)
        if entries is None:
            return
        enter = self.enter

        def noted(collective: Collective, asynchronous: bool = False) -> None:
            if len(entries) < MAX_NOTED:
                entries.append(ScheduleEntry(*collective[:3]))
            enter(collective, asynchronous)

        self.enter = noted  # type: ignore[method-assign]

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self, kind: int, *, sig: int = 0, aux: int = 0) -> None:
        self._append(*sealed_part(aux, 0, sig, 0, self._phase, NO_GROUP, kind), 0)

    def _append(self, fixed: bytes, check: int, seq: int) -> None:
        self._num_events = n = self._num_events + 1
        at = self._next_at
        end = at + _RECORD
        self._next_at = end if end != self._ring_end else self._ring_at
        row = _pack(n, self._clock(), seq, 0, self._step, 0)
        _seal_into(self._buffer, at, fixed, row, crc32(row, check))
        self._words[_NUM_EVENTS] = n * GUARD

    # -- interning -----------------------------------------------------------------------------------------------

    @staticmethod  # a bound method would be a cycle, which keeps the file open after the last use of the recorder
    def _new_group(index: int) -> Group:
        return Group(index)

    def _call_from(self, caller: FrameType, collective: Collective) -> Call:
        """Search the stack for the call site of a collective, and return its `Call`, the prepared records of this site.

        The call site is the first frame, from ``caller`` outwards, for which `is_between` is false; if there is none,
        the outermost frame.
        """
        depth, frame = 1, caller
        while is_between(frame.f_code) and frame.f_back is not None:
            depth, frame = depth + 1, frame.f_back
        self._depth = depth
        group, op, layer, sizes, dtype, reduce_op, root = collective
        key = (group, op, layer, dtype, reduce_op, root, len(sizes), id(frame.f_code), frame.f_lasti)
        return self._calls.get(key) or self._make_call(collective, key, frame)

    def _call_of(self, collective: Collective | None) -> Call:
        """Return the `Call` (prepared records) of a collective whose call site is no longer known.

        The first such request makes the `Call`; later requests for the same collective get the same object.
        """
        assert collective is not None, "either the collective or its call is given"
        group, op, layer, sizes, dtype, reduce_op, root = collective
        key = (group, op, layer, dtype, reduce_op, root, len(sizes))
        return self._calls.get(key) or self._make_call(collective, key, None)

    def _make_call(self, collective: Collective, key: tuple[object, ...], frame: FrameType | None) -> Call:
        """Make the `Call` (prepared records) of a collective at a call site. Write its strings and group to the file.

        key     the key of this `Call` in ``_calls``
        frame   the call site; None if it is not known

        A send or receive gets a group of its two ranks: "ep:2>5" for sends in "ep" from global rank 2 to global rank 5.
        So a send has the same sequence number as its receive.
        """
        name, op = collective.group, collective.op
        rest = (collective.layer, collective.dtype, collective.reduce_op)
        digested: tuple[str, ...] = (op, *rest)
        members = self._groups.members(name)
        # the program may name a root that is no member of the group
        if op in _POINT_TO_POINT and 0 <= collective.root < len(members):
            ends = (self._writer.rank, members[collective.root])
            source, target = ends if op == "send" else ends[::-1]
            # the rolling hash covers only what is equal at both ends: the operation is send here, recv there
            name, digested = f"{name}:{source}>{target}", ("p2p", collective.dtype)
            self._groups.declare(name, (source, target))
        string = self._intern(SEPARATOR.join((name, op, *rest)))
        digest = crc32(SEPARATOR.join((name, *digested)).encode()).to_bytes(4, "little")
        group = self._groups.of(name)
        num_sizes = len(collective.sizes)
        shared = (collective.root, num_sizes, string, self._site(frame), self._phase, group.index)
        entry = ScheduleEntry(collective.group, op, collective.layer)
        call = self._new_call(group, digest, num_sizes, entry, lambda kind: sealed_part(*shared, kind))
        self._calls[key] = call
        return call

    def _new_call(
        self,
        group: Group,
        digest: bytes,
        num_sizes: int,
        entry: ScheduleEntry,
        fixed: Callable[[int], tuple[bytes, int]],
    ) -> Call:
        return Call(group, digest, num_sizes, entry, fixed)

    def _site(self, frame: FrameType | None) -> int:
        """Store "file:line function" of a call site as a string, and return its number; 0 if ``frame`` is None."""
        if frame is None:
            return 0
        code = frame.f_code
        self._codes.append(code)
        return self._intern(f"{code.co_filename}:{frame.f_lineno} {code.co_qualname}")
