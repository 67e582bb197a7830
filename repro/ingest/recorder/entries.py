"""Sort the entries of a Flight Recorder dump by process group, and store their fields in columns (`Calls`)."""

from __future__ import annotations

import math
import re
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from marshal import dumps
from typing import Any

from repro.ingest.names.operations import operation
from repro.trace.foreign.operations import NO_NUMBER, Calls, Form
from repro.trace.foreign.records import Group
from repro.trace.knowledge import NOTHING, Knows

MAX_FRAMES, MAX_TENSORS, MAX_DIMENSIONS = 24, 64, 16
MAX_NS = 1 << 62
MAX_TEXT, MAX_GROUPS = 200, 10_000
EVENT_BACKENDS = ("nccl", "xccl", "hccl", "mccl", "cncl", "eccl", "rccl")
"""Backends that record when an operation completes. If an entry of such a backend is retired but not completed, the
operation ran into a time-out."""

_TRANSFER = re.compile(r"(send|recv) (\d{1,7})(?:->|<-)(\d{1,7})")


def knowledge_of(entries: Sequence[Mapping[str, Any]]) -> Knows:
    """Return which facts the entries of a dump show, as flags: for example ARGUMENTS for sizes and data types.

    A flag is set only if the first and the last entry both show the fact. The entries between are not examined, because
    torch writes the same fields into all entries of a dump.
    """
    return _shown_by(entries[0]) & _shown_by(entries[-1]) if entries else Knows.ORDER | Knows.COMPLETION


def _shown_by(entry: Mapping[str, Any]) -> Knows:
    knows = NOTHING
    has_number = entry.get("is_p2p") or {"collective_seq_id", "seq_id"} & entry.keys()
    if has_number and "profiling_name" in entry and {"process_group", "pg_name"} & entry.keys():
        knows |= Knows.ORDER
    if {"retired", "state"} & entry.keys():
        knows |= Knows.COMPLETION
    if {"input_sizes", "output_sizes", "input_dtypes", "output_dtypes"} <= entry.keys():
        knows |= Knows.ARGUMENTS
    if "time_created_ns" in entry:
        knows |= Knows.TIME
    return knows


@dataclass(slots=True)
class Rows:
    """The entries of one process group in a dump.

    index     the number of the group in the dump, from 0; the groups are in the order of their first entries
    backend   the text that `backend_of` returns, such as "nccl"
    entries   the entries, oldest first
    numbers   for each entry: its `record_id`; without a valid `record_id`, the index of the entry in the dump
    over      for each entry: 1 if its operation is over, else 0
    """

    index: int
    backend: str
    entries: list[Mapping[str, Any]] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    over: bytearray = field(default_factory=bytearray)


def by_group(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str, str], Rows], array[int]]:
    """Sort the entries of a dump by process group.

    Returns two values: a dict from (id, name, description) of a group to the entries of this group; and an array that
    has, for each entry of the dump, the index of its group.
    """
    rows: dict[tuple[str, str, str], Rows] = {}
    quick: dict[Any, Rows] = {}
    order = array("H")
    for place, entry in enumerate(entries):
        get = entry.get
        pair = get("process_group")
        try:
            row = quick[get("pg_id"), pair]
        # KeyError: the first entry of a group. TypeError: the pair is a list, which JSON has in place of a tuple.
        except (KeyError, TypeError):
            key = _group_key(entry)
            if key not in rows and len(rows) == MAX_GROUPS:
                raise ValueError(f"more than {MAX_GROUPS} process groups, so the file must be damaged") from None
            row = rows.setdefault(key, Rows(len(rows), backend_of(entry)))
            if isinstance(pair, tuple) and all(isinstance(word, int | str) for word in (get("pg_id"), *pair)):
                quick[get("pg_id"), pair] = row
        number = get("record_id")
        row.entries.append(entry)
        row.numbers.append(number if type(number) is int and 0 <= number < MAX_NS else place)
        row.over.append(get("state") == "completed" or _is_retired(entry, row.backend))
        order.append(row.index)
    return rows, order


def _group_key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    pair = entry.get("process_group")
    name, description = "", ""
    if isinstance(pair, (list, tuple)) and pair:
        name, description = short_text(pair[0]), short_text(pair[1]) if len(pair) > 1 else ""
    return short_text(entry.get("pg_id")), name or short_text(entry.get("pg_name")), description


def short_text(value: Any) -> str:
    """Return a string or an integer as a text of limited length; "" for any other type.

    The dump is untrusted: it could have, for example, a nested list whose text would be very long.
    """
    if isinstance(value, str):
        return value[:MAX_TEXT]
    return str(value) if isinstance(value, int) and -MAX_NS < value < MAX_NS else ""


def backend_of(entry: Mapping[str, Any]) -> str:
    """Return the part of an entry's name before the colon: the backend, "nccl" in "nccl:all_reduce".

    In dumps of TorchComms, this part is the group's description.
    """
    return short_text(entry.get("profiling_name")).rpartition(":")[0]


def _is_retired(entry: Mapping[str, Any], backend: str) -> bool:
    """Whether the field `retired` shows that an operation is over.

    The result is False for an operation that ran into its time-out, although it is retired, too. Such an operation has
    a backend of EVENT_BACKENDS, no time of completion, and still the state "scheduled" or "started".
    """
    retired = bool(entry.get("retired"))
    if retired and backend in EVENT_BACKENDS and not entry.get("time_discovered_completed_ns"):
        # The backend saw no completion. If the state is still "scheduled" or "started", the operation timed out.
        return entry.get("state") not in ("scheduled", "started")
    return retired


def complete_the_earlier(rows: Rows) -> None:
    """Mark collectives as over if a later collective of their group is over.

    The reason: a group completes its collectives in the order of their entries. This is not true for gloo, so nothing
    is marked in a group of gloo.

    A coalesced operation has an entry for each part, and after them an entry for the whole, with the same number. Only
    the completion of the whole is recorded. If the whole is over, mark its parts as over.

    rows: the entries of one group
    """
    if rows.backend == "gloo" or 0 not in rows.over:
        return
    over, later, coalesced = rows.over, False, None
    for index in range(len(over) - 1, -1, -1):
        entry = rows.entries[index]
        name = entry.get("profiling_name")
        if isinstance(name, str) and name.endswith(":coalesced"):
            coalesced = entry if over[index] else None
        elif coalesced is not None:
            if _is_member(entry, coalesced):
                over[index] = True
            else:
                coalesced = None
        if not entry.get("is_p2p"):
            later = over[index] = later or bool(over[index])


def _is_member(entry: Mapping[str, Any], coalesced: Mapping[str, Any]) -> bool:
    number = "p2p_seq_id" if entry.get("is_p2p") else "collective_seq_id"
    return entry.get(number) == coalesced.get(number) and bool(entry.get("is_p2p")) == bool(coalesced.get("is_p2p"))


class Columns:
    """Converts the entries of a dump to columns (`Calls`), that is one array for each field.

    Names, sizes, types and stacks that repeat are parsed only once.
    """

    def __init__(self, file: str, entries: Sequence[Mapping[str, Any]]) -> None:
        self._file = file
        self._frames: dict[tuple[int, ...], tuple[str, ...]] = {}
        times = (at for entry in entries if type(at := entry.get("time_created_ns")) is int and 0 < at < MAX_NS)
        first = next(times, None)
        self._year_s = _start_of_year(first // 86_400_000_000_000) if first is not None else 0.0

    def calls(self, rows: Rows, group: Group) -> Calls:
        """Convert the entries of one group to columns. This loop takes most of the time of reading a large dump."""
        year_s, forms = self._year_s, _Forms(group.members, self._frames_of)
        known: dict[object, int] = {}
        form, seqs, times_s = array("I"), array("q"), array("d")
        for entry in rows.entries:
            get = entry.get
            content = (
                get("profiling_name"), get("input_sizes", get("sizes")), get("output_sizes"),
                get("input_dtypes"), get("output_dtypes"),
            )  # fmt: skip
            frames = get("frames")
            try:  # `marshal` makes a key no larger than the entry itself, so a hostile file cannot use up memory here
                key = dumps(content), tuple(map(id, frames[:MAX_FRAMES])) if frames else ()
            except (TypeError, ValueError):
                key = None
            index = known.get(key)
            if index is None:
                index = forms.index_of(*content, frames)
                if key is not None:
                    known[key] = index
            form.append(index)
            seq = get("collective_seq_id", get("seq_id"))
            if type(seq) is not int or not 0 <= seq < MAX_NS or get("is_p2p") or forms.is_transfer[index]:
                seq = NO_NUMBER
            seqs.append(seq)
            at = get("time_created_ns")
            times_s.append(at / 1e9 - year_s if type(at) is int and 0 < at < MAX_NS else math.nan)
        return Calls(tuple(forms.forms), form, seqs, bytes(rows.over), times_s, rows.numbers, self._file)

    def _frames_of(self, value: Any) -> tuple[str, ...]:
        """Return the innermost frames of an entry as text.

        Equal stacks share the same frame objects in a dump, so the result is cached by the ids of these objects.
        """
        if not isinstance(value, (list, tuple)) or not value:
            return ()
        key = tuple(map(id, value[:MAX_FRAMES]))
        frames = self._frames.get(key)
        if frames is None:
            rows = [frame for frame in value[:MAX_FRAMES] if isinstance(frame, dict)]
            named = [
                f"{short_text(r.get('name'))} ({short_text(r.get('filename'))}:{short_text(r.get('line'))})"
                for r in rows
            ]
            frames = self._frames[key] = _shared(tuple(map(sys.intern, named)))
        return frames


class _Forms:
    """The distinct operations of one process group, numbered from 0.

    Operations with the same name, sizes, types, peer and stack count as one: they share a form.
    """

    def __init__(self, members: tuple[int, ...], frames_of: Callable[[Any], tuple[str, ...]]) -> None:
        self.forms: list[Form] = []
        self.is_transfer: list[bool] = []
        self._members, self._frames_of = members, frames_of
        self._numbers: dict[Form, int] = {}

    def index_of(self, name: Any, ins: Any, outs: Any, in_types: Any, out_types: Any, frames: Any) -> int:
        """Return the number of an entry's form (these values, which many entries share). A new form gets a new number.

        ins, outs             the sizes of the entry's input and output tensors
        in_types, out_types   their dtypes
        """
        text = short_text(name)
        op, peer = operation(text), None
        if " " in text and (transfer := _TRANSFER.search(text)):
            op, peer = transfer[1], int(transfer[3])
            if self._members:
                peer = self._members[peer] if peer < len(self._members) else None
        sizes, dtypes = _shared(_sizes(ins) + _sizes(outs)), _shared(_words(in_types) + _words(out_types))
        form = Form(sys.intern(op), sizes, dtypes, peer, self._frames_of(frames))
        index = self._numbers.setdefault(form, len(self.forms))
        if index == len(self.forms):
            self.forms.append(form)
            self.is_transfer.append(form.is_transfer)
        return index


@lru_cache(maxsize=65_536)
def _shared(value: Any) -> Any:
    """Return the same object for equal values, to save memory, and because comparing an object with itself is fast."""
    return value


def _sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        return ()
    rows = [row[:MAX_DIMENSIONS] for row in value[:MAX_TENSORS] if isinstance(row, (list, tuple))]
    return tuple([tuple([n for n in row if isinstance(n, int) and -MAX_NS < n < MAX_NS]) for row in rows])


def _words(value: Any) -> tuple[str, ...]:
    return tuple([short_text(word)[:64] for word in value[:MAX_TENSORS]]) if isinstance(value, (list, tuple)) else ()


@lru_cache(maxsize=512)
def _start_of_year(day: int) -> float:
    return datetime(datetime.fromtimestamp(day * 86_400, UTC).year, 1, 1, tzinfo=UTC).timestamp()
