"""Read what a rank left behind: a :class:`Witness` from a witness file, whole or torn, live or long dead.

    witness = read("runs/latest/events/rank000.wit")
    for event in witness.events(): ...

The layout is in :mod:`repro.layout`. Reading never writes, locks or waits, and trusts nothing: what cannot be right
is left out and named in ``witness.problems`` as ``file:offset: what``; only a file without a usable header is
refused, with :class:`WitnessError`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hybrid_moe_ref.files import open_regular
from repro.layout import (
    ENTRY_SEPARATOR,
    GROUP_BYTES,
    GROUP_NAME,
    GROUP_STATE,
    GROUPS_AT,
    HEART,
    HEART_AT,
    LAST_AT,
    LIVE,
    LIVE_AT,
    RECORD,
    SEPARATOR,
    STATE_AT,
    WORD,
    Event,
    Geometry,
    Identity,
    Kind,
    column,
    pack_header,
)
from repro.parse import WitnessError, parse_header, parse_ring, parse_strings

__all__ = ["Event", "GroupTrace", "Signature", "Tail", "Witness", "WitnessError", "create", "parse", "read", "read_dir"]

SUFFIX = ".wit"
MAX_BYTES = 1 << 28
_MAX_PROBLEMS = 20
_RECENT = 16  # events at the end of the ring that a group's slot may lack; one, in truth


class Signature(NamedTuple):
    """What all ranks of a collective must share, apart from sizes and root."""

    group: str
    op: str
    layer: str
    dtype: str
    reduce_op: str


@dataclass(frozen=True, slots=True)
class GroupTrace:
    """What one rank did in one group, as far as it can be known: the newest of slot and ring."""

    name: str
    members: tuple[int, ...]
    issued: int  # sequence number of the last collective issued, 0 = none
    left: int  # sequence number of the last one completed
    hash: int  # rolling hash of the signatures of all issued
    last: Event | None  # the last issue


@dataclass(frozen=True, slots=True)
class Witness:
    """What one rank said. ``complete`` is False when events newer than the last readable one are known to exist."""

    name: str
    who: Identity
    strings: list[str]
    groups: tuple[GroupTrace, ...]
    records: bytes  # the readable records, oldest first
    last: Event | None
    num_events: int
    first_event: int  # number of the oldest readable event: above 1 the ring has wrapped
    complete: bool
    heartbeat_ns: int
    heartbeat: str
    problems: tuple[str, ...]
    vectors: bytes = b""
    shape: Geometry = field(default_factory=Geometry, repr=False)
    _signatures: dict[int, Signature] = field(default_factory=dict, repr=False)

    @property
    def rank(self) -> int:
        return self.who.rank

    def last_event_ns(self) -> int:
        """When the rank last said anything but a heartbeat, 0 if never."""
        return self.last.t_ns if self.last else 0

    def line(self, n: int) -> str:
        """Where event ``n`` stands: "rank003.wit:38912 event 118"."""
        at = self.shape.ring_at + (n - 1) % self.shape.ring_records * RECORD.size
        return f"{self.name.rpartition('/')[2]}:{at} event {n}"

    @property
    def has_free_slots(self) -> bool:
        """Whether a group without a slot would have got one: then the rank has issued nothing in it."""
        return len(self.groups) < self.shape.group_slots

    def last_kind(self, group: tuple[str, tuple[int, ...]], seq: int) -> int | None:
        """What the rank last recorded about a collective: the kind of the event, None if the ring has lost it."""
        index = next((i for i, each in enumerate(self.groups) if (each.name, each.members) == group), None)
        if index is None:
            return None
        newest_first = zip(*(reversed(self.column(name)) for name in ("group", "seq", "kind")), strict=True)
        last = self.groups[index].last
        remembered = last.kind if last is not None and last.seq == seq else None
        return next((kind for place, number, kind in newest_first if (place, number) == (index, seq)), remembered)

    def events(self, newest: int | None = None) -> Iterator[Event]:
        """All readable events, or only so many of the newest; oldest first."""
        start = 0 if newest is None else max(0, len(self.records) - newest * RECORD.size)
        return map(Event._make, RECORD.iter_unpack(memoryview(self.records)[start:]))

    def event(self, index: int) -> Event:
        """The readable event at a place, 0 the oldest."""
        return Event._make(RECORD.unpack_from(self.records, index * RECORD.size))

    def column(self, field: str) -> list[int]:
        """One field of all readable events, oldest first."""
        return column(self.records, field)

    def text(self, string: int) -> str:
        """The interned string, or "?" where it was lost."""
        return self.strings[string] if string < len(self.strings) else "?"

    def signature(self, sig: int) -> Signature:
        """The signature of a collective's ``sig``."""
        known = self._signatures.get(sig)
        if known is None:
            known = self._signatures[sig] = _signature(self.text(sig))
        return known

    def schedule(self, sig: int) -> tuple[tuple[str, str, str], ...]:
        """The declared schedule of a STEP event's ``sig``: (group, op, layer) of each entry."""
        return _schedule(self.text(sig))

    def sizes(self, vector: int, num_sizes: int) -> tuple[int, ...]:
        """An event's size vector; empty where there was none or the vector ring has overwritten it."""
        if num_sizes <= 1:
            return (vector,) * num_sizes
        words = len(self.vectors) // WORD.size
        at = vector % words if words else 0
        end = at + 1 + num_sizes
        if end > words or WORD.unpack_from(self.vectors, at * WORD.size)[0] != vector + 1:
            return ()
        return _sizes(self.vectors[(at + 1) * WORD.size : end * WORD.size])


# Ranks say the same things: what one rank's text means is worked out once for all of them.


@lru_cache(maxsize=65_536)
def _signature(text: str) -> Signature:
    return Signature(*(text.split(SEPARATOR) + ["?"] * 5)[:5])


@lru_cache(maxsize=4096)
def _sizes(words: bytes) -> tuple[int, ...]:
    return tuple(memoryview(words).cast("q"))


@lru_cache(maxsize=1024)
def _schedule(text: str) -> tuple[tuple[str, str, str], ...]:
    entries = (entry.split(SEPARATOR) for entry in text.split(ENTRY_SEPARATOR) if entry)
    return tuple((group, op, layer) for group, op, layer in (e for e in entries if len(e) == 3))


@lru_cache(maxsize=4096)
def _members(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(rank) for rank in text.split(","))
    except ValueError:
        return ()


def create(path: str | os.PathLike[str], who: Identity, shape: Geometry | None = None) -> None:
    """Make a witness file with all its blocks allocated: a full disk is an OSError here, not a SIGBUS later."""
    shape = shape or Geometry()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, shape.file_bytes)
        os.pwrite(descriptor, pack_header(who, shape), 0)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> Witness:
    """Read one witness file; OSError or WitnessError says why not."""
    with _opened(path) as file:
        return parse(file.read(MAX_BYTES), str(path))


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file of a size that a witness may have."""
    try:
        return open_regular(path, MAX_BYTES)
    except ValueError as error:
        raise WitnessError(str(error)) from None


def read_dir(path: str | os.PathLike[str]) -> tuple[dict[int, Witness], list[str]]:
    """All witnesses of a folder by rank, and one line for each file that could not be used."""
    witnesses: dict[int, Witness] = {}
    refused: list[str] = []
    for file in sorted(Path(path).glob(f"*{SUFFIX}")):
        try:
            witness = read(file)
        except (OSError, WitnessError) as error:
            refused.append(str(error))
            continue
        if witness.rank in witnesses:
            refused.append(f"{file}:0: rank {witness.rank} is already told by {witnesses[witness.rank].name}")
        else:
            witnesses[witness.rank] = witness
    return witnesses, refused


def parse(data: bytes, name: str) -> Witness:
    """Everything readable in the bytes of a witness file."""
    who, shape = parse_header(data, name)
    problems: list[str] = []
    if len(data) < shape.file_bytes:
        problems.append(f"{name}:{len(data)}: the file ends early, {shape.file_bytes} bytes were laid out")
    size, data = len(data), data.ljust(GROUPS_AT, b"\0")
    strings = parse_strings(data, shape, name, problems)
    promised = LIVE.unpack_from(data, LIVE_AT)[0]
    records, last, torn = parse_ring(data, shape, promised, len(strings), name, problems)
    num_events = last.n if last else 0
    if promised > num_events + torn and size >= shape.file_bytes:
        problems.append(
            f"{name}:{LIVE_AT}: {promised} events are promised, the newest that can be read is {num_events}"
        )
    first = num_events - len(records) // RECORD.size + 1 if last else 0
    beat_ns, beat_name, _ = HEART.unpack_from(data, HEART_AT)
    complete = not torn and num_events >= promised and size >= GROUPS_AT
    beat = strings[beat_name] if beat_name < len(strings) else "?"
    vectors = data[shape.vectors_at : shape.strings_at]
    witness = Witness(
        name, who, strings, (), records, last, num_events, first, complete, beat_ns, beat, (), vectors, shape
    )
    groups, sound = _parse_groups(data, shape, witness, problems)
    if not sound or any(not group.members for group in groups):
        complete = False  # what this rank did in such a group cannot be set against its peers
    if len(problems) > _MAX_PROBLEMS:
        problems[_MAX_PROBLEMS:] = [f"{name}: {len(problems) - _MAX_PROBLEMS} further problems"]
    return replace(witness, groups=groups, complete=complete, problems=tuple(problems))


def _parse_groups(
    data: bytes, shape: Geometry, witness: Witness, problems: list[str]
) -> tuple[tuple[GroupTrace, ...], bool]:
    """The groups, and whether nothing is wrong with what their slots say."""
    ahead = _newest_calls(witness)
    traces = []
    known = len(problems)
    for index in range(min(shape.group_slots, (len(data) - GROUPS_AT) // GROUP_BYTES)):
        at = GROUPS_AT + index * GROUP_BYTES
        name, members = GROUP_NAME.unpack_from(data, at)
        if name == 0:
            break
        if max(name, members) >= len(witness.strings):
            problems.append(f"{witness.name}:{at}: the name or the members of group {index} are lost")
        left_seq, rolling = GROUP_STATE.unpack_from(data, at + STATE_AT)
        slot = Event._make(RECORD.unpack_from(data, at + LAST_AT))
        issued, left = ahead.get(index, (None, None))
        last: Event | None = slot if slot.n and slot.n & 0xFFFFFFFF == slot.check else None
        if last is not None and not _may_stand_in_slot(last, index, witness):
            problems.append(f"{witness.name}:{at + LAST_AT}: not the last collective issued in group {index}")
            last = None
        elif last is None and slot.n and issued is None:
            problems.append(f"{witness.name}:{at + LAST_AT}: torn record of group {index}")
        if issued and (last is None or last.n < issued.n):
            last, rolling = issued, 0
        left_seq = max(left_seq, left.seq if left else 0)
        if left_seq > (last.seq if last else 0):
            problems.append(f"{witness.name}:{at + STATE_AT}: #{left_seq} of group {index} completed, but never issued")
            left_seq, rolling = last.seq if last else 0, 0
        ranks = _members(witness.text(members))
        traces.append(GroupTrace(witness.text(name), ranks, last.seq if last else 0, left_seq, rolling, last))
    return tuple(traces), len(problems) == known


def _may_stand_in_slot(last: Event, index: int, witness: Witness) -> bool:
    """Whether a group's slot holds an issue in that group, the same as the ring has where it still has it."""
    if last.kind not in (Kind.ENTER, Kind.ISSUE) or last.group != index or not last.seq:
        return False
    in_ring = witness.first_event <= last.n <= witness.num_events
    return not in_ring or witness.event(last.n - witness.first_event) == last


def _newest_calls(witness: Witness) -> dict[int, tuple[Event | None, Event | None]]:
    """The last issues and completions in the ring, which is written before a group's slot."""
    newest: dict[int, tuple[Event | None, Event | None]] = {}
    for event in witness.events(_RECENT):
        issued, left = newest.get(event.group, (None, None))
        if event.kind in (Kind.ENTER, Kind.ISSUE):
            newest[event.group] = event, left
        elif event.kind == Kind.LEAVE and (left is None or left.seq < event.seq):
            newest[event.group] = issued, event
    return newest


class Tail:
    """A cheap look at a live witness file, to be polled many times a second."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with _opened(self.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size < GROUPS_AT:
                raise WitnessError(f"{self.path}:{size}: the file ends inside its header")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._who, self._shape = parse_header(self._map[:GROUPS_AT], str(self.path))
        self._num_events = 0

    def num_events(self) -> int:
        self._num_events = max(self._num_events, LIVE.unpack_from(self._map, LIVE_AT)[0])
        return self._num_events

    def last_event_ns(self) -> int:
        """When the rank last said anything but a heartbeat, 0 if never."""
        event = self.last_event()
        return event.t_ns if event else 0

    def last_event(self) -> Event | None:
        """The newest record alone; None when there is none or it is being written just now."""
        num_events = self.num_events()
        if num_events == 0:
            return None
        at = self._shape.ring_at + (num_events - 1) % self._shape.ring_records * RECORD.size
        event = Event._make(RECORD.unpack_from(self._map, at))
        return event if event.n == num_events and event.check == num_events & 0xFFFFFFFF else None

    def heartbeat_ns(self) -> int:
        return int(HEART.unpack_from(self._map, HEART_AT)[0])

    def who(self) -> Identity:
        """The writer; its pid is 0 until the rank has opened the file."""
        if not self._who.pid:
            self._who = parse_header(self._map[:GROUPS_AT], str(self.path))[0]
        return self._who

    def witness(self) -> Witness:
        return read(self.path)

    def close(self) -> None:
        self._map.close()
