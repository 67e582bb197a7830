"""PyTorch's Flight Recorder dumps (pickle or JSON, versions 2.0 to 2.10, and the bare list of 2023) to `RecorderDump`.

Source of the format: torch/csrc/distributed/c10d/FlightRecorder.hpp and its pickler, torch 2.2 to 2.13.

What a reader must know, and what this one does about it:

- Nothing in a dump says whose it is: the rank is the last number in the file's name.
- On gloo `state` stays "scheduled" for ever; only `retired` shows an end. So it is in TorchComms' dumps. On NCCL an
  operation that is retired but not completed ran into its time-out, and one that is followed by a completed one of its
  group is over whatever its state says. Operations inside a coalesced group have no events of their own.
- `pg_config` is keyed by a group's name, `pg_status` by its id: the entries join the two. In gloo dumps `pg_config`
  is empty.
- The names of transfers ("recv 1<-0") count ranks of the group.
"""

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

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.ingest.names.operations import operation
from repro.ingest.recorder import pickles
from repro.trace.observed import Group, GroupRecord, RecorderDump, Source
from repro.trace.operations import NO_CALLS, NO_NUMBER, Calls, Form

MAX_ENTRIES = 50_000
MAX_FRAMES, MAX_TENSORS, MAX_DIMENSIONS = 24, 64, 16
MAX_NS = 1 << 62
MAX_TEXT, MAX_RANKS, MAX_GROUPS = 200, 131_072, 10_000
EVENT_BACKENDS = ("nccl", "xccl", "hccl", "mccl", "cncl", "eccl", "rccl")
"""Backends that see an operation complete: one that is retired and not completed ran into its time-out."""

_TRANSFER = re.compile(r"(send|recv) (\d{1,7})(?:->|<-)(\d{1,7})")
_LAST_NUMBER = re.compile(r"(\d{1,7})\D*$")


class NotARecorderDump(ValueError):
    """The bytes are something else; another reader may know them."""


def looks_like(head: bytes) -> bool:
    """Whether the first bytes of a file may be a recorder dump."""
    if head[:1] == b"\x80":
        return True
    start = head.lstrip()[:4096]
    return start[:1] in (b"{", b"[") and (b'"pg_config"' in head or b'"entries"' in head or b'"profiling_name"' in head)


def rank_of(name: str) -> int | None:
    """The rank that a file's name ends in: "nccl_trace_rank_7", "rank0.json", "_dump_12", "trace_rank_host_5.pkl"."""
    stem = name.rpartition("/")[2][-200:]
    stem = re.sub(r"(\.(pkl|pickle|json|bin|dump|trace|pt))+$", "", stem)
    labelled = re.findall(r"rank[_\-]?(\d{1,7})(?=[._\-]|$)", stem)
    found = _LAST_NUMBER.search(stem)
    if len(labelled) == 1 and not (found and stem.endswith(found.group(1))):
        return int(labelled[0])
    return int(found.group(1)) if found else None


def read(data: bytes, file: str, rank: int | None = None) -> RecorderDump:
    """One dump. Raises NotARecorderDump for other files, DamagedFile ("file:offset: what") for a damaged one."""
    if data[:1] == b"\x80":
        content = pickles.load(data, file)
    else:
        content = parse_json(data, file)
    if isinstance(content, list):  # a nightly of 2023 dumped the entries alone
        content = {"entries": content}
    if not isinstance(content, dict) or not {"entries", "pg_config", "pg_status"} & content.keys():
        raise NotARecorderDump("neither entries nor groups are in it")
    rank = rank_of(file) if rank is None else rank
    if rank is None:
        raise DamagedFile(f"{file}:0: its name ends in no number, so the rank is not known: name it …_rank_N")
    return _dump(content, file, rank)


def _dump(content: Mapping[str, Any], file: str, rank: int) -> RecorderDump:
    entries = content.get("entries") or []
    if not isinstance(entries, list):
        raise DamagedFile(f"{file}:0: entries is not a list")
    entries = [entry for entry in entries[-MAX_ENTRIES:] if isinstance(entry, dict)]
    config = _mapping(content.get("pg_config"))
    status = _mapping(content.get("pg_status"))
    rows, order = _by_group(entries)
    known = _Known(file, entries)
    records = []
    for (pg_id, name, description), row in rows.items():
        group = _group(name, description, config)
        _complete_the_earlier(row)
        enqueued, _, completed = _counters(status.get(pg_id))
        records.append(GroupRecord(group, known.calls(row, group), enqueued, completed, pg_id))
    seen = {pg_id for pg_id, *_ in rows}
    for pg_id, counters in status.items():  # groups whose entries were overwritten, or left out as all are over
        if pg_id not in seen:
            enqueued, _, completed = _counters(counters)
            records.append(GroupRecord(Group(""), NO_CALLS, enqueued, completed, pg_id))
    first = entries[0].get("record_id", 0) if entries else 0
    return RecorderDump(
        rank,
        tuple(records),
        order,
        tuple(_group(name, "", config) for name in list(config)[:MAX_GROUPS] if name),
        next((_backend(entry) for entry in entries), ""),
        _text(content.get("comm_lib_version") or content.get("nccl_version")),
        isinstance(first, int) and first > 0,
        max((at for record in records for call in record.calls[-1:] if (at := call.at_s) is not None), default=None),
        Source(file),
    )


@dataclass(slots=True)
class _Rows:
    """The entries of one group, their numbers in the dump, and 1 for each that is over."""

    index: int
    backend: str
    entries: list[Mapping[str, Any]] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    over: bytearray = field(default_factory=bytearray)


def _by_group(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[tuple[str, str, str], _Rows], array[int]]:
    """Sort the entries by group. The array has the index of the group of each entry."""
    rows: dict[tuple[str, str, str], _Rows] = {}
    quick: dict[Any, _Rows] = {}
    order = array("H")
    for place, entry in enumerate(entries):
        get = entry.get
        pair = get("process_group")
        try:
            row = quick[get("pg_id"), pair]
        except (KeyError, TypeError):  # the first of a group, or a list, which JSON has in the place of a tuple
            key = _group_key(entry)
            if key not in rows and len(rows) == MAX_GROUPS:
                raise ValueError(f"more than {MAX_GROUPS} process groups") from None
            row = rows.setdefault(key, _Rows(len(rows), _backend(entry)))
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
        name, description = _text(pair[0]), _text(pair[1]) if len(pair) > 1 else ""
    return _text(entry.get("pg_id")), name or _text(entry.get("pg_name")), description


def _text(value: Any) -> str:
    """A name or number, cut short; "" for anything else, whose text might be without end."""
    if isinstance(value, str):
        return value[:MAX_TEXT]
    return str(value) if isinstance(value, int) and -MAX_NS < value < MAX_NS else ""


def _backend(entry: Mapping[str, Any]) -> str:
    """ "nccl" of "nccl:all_reduce". TorchComms writes the description of the group there."""
    return _text(entry.get("profiling_name")).rpartition(":")[0]


def _is_retired(entry: Mapping[str, Any], backend: str) -> bool:
    """Whether an entry that is not marked as completed is over."""
    retired = bool(entry.get("retired"))
    if retired and backend in EVENT_BACKENDS and not entry.get("time_discovered_completed_ns"):
        return entry.get("state") not in ("scheduled", "started")  # taken off the list by the time-out
    return retired


def _complete_the_earlier(rows: _Rows) -> None:
    """Collectives of a group complete in their order: what stands before a completed one is over. So are the members of
    a coalesced operation, which have no events of their own: they stand before it and share its number.
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


class _Known:
    """What many entries of a dump share, so that it is taken apart once: names, sizes, types, stacks, the year."""

    def __init__(self, file: str, entries: Sequence[Mapping[str, Any]]) -> None:
        self._file = file
        self._frames: dict[tuple[int, ...], tuple[str, ...]] = {}
        times = (at for entry in entries if type(at := entry.get("time_created_ns")) is int and 0 < at < MAX_NS)
        first = next(times, None)
        self._year_s = _start_of_year(first // 86_400_000_000_000) if first is not None else 0.0

    def calls(self, rows: _Rows, group: Group) -> Calls:
        """The operations of one group in columns. This loop takes most of the time of a large dump."""
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
            try:  # what `marshal` writes is no larger than what was read: a hostile file cannot make a key large
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
        """The innermost frames. torch writes a frame that many entries share once, so its address names it."""
        if not isinstance(value, (list, tuple)) or not value:
            return ()
        key = tuple(map(id, value[:MAX_FRAMES]))
        frames = self._frames.get(key)
        if frames is None:
            rows = [frame for frame in value[:MAX_FRAMES] if isinstance(frame, dict)]
            named = [f"{_text(r.get('name'))} ({_text(r.get('filename'))}:{_text(r.get('line'))})" for r in rows]
            frames = self._frames[key] = _shared(tuple(map(sys.intern, named)))
        return frames


class _Forms:
    """The forms of the operations of one group, numbered."""

    def __init__(self, members: tuple[int, ...], frames_of: Callable[[Any], tuple[str, ...]]) -> None:
        self.forms: list[Form] = []
        self.is_transfer: list[bool] = []
        self._members, self._frames_of = members, frames_of
        self._numbers: dict[Form, int] = {}

    def index_of(self, name: Any, ins: Any, outs: Any, in_types: Any, out_types: Any, frames: Any) -> int:
        """The number of the form, which is added where it is new."""
        text = _text(name)
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
    """The same object for equal values of all ranks, so that they are stored once and compared by address."""
    return value


def _sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        return ()
    rows = [row[:MAX_DIMENSIONS] for row in value[:MAX_TENSORS] if isinstance(row, (list, tuple))]
    return tuple([tuple([n for n in row if isinstance(n, int) and -MAX_NS < n < MAX_NS]) for row in rows])


def _words(value: Any) -> tuple[str, ...]:
    return tuple([_text(word)[:64] for word in value[:MAX_TENSORS]]) if isinstance(value, (list, tuple)) else ()


def _group(name: str, description: str, config: Mapping[str, Any]) -> Group:
    known = config.get(name)
    known = known if isinstance(known, dict) else {}
    described = _text(known.get("desc"))
    if description in ("", "undefined") and described:
        description = described
    return Group(name, description, _members(known.get("ranks")))


def _members(ranks: Any) -> tuple[int, ...]:
    """The ranks of a group: "[0, 1]" in every version, a list in TorchComms' dumps."""
    if isinstance(ranks, str):
        return _ranks_in(ranks)
    if isinstance(ranks, (list, tuple)):
        return tuple([rank for rank in ranks[:MAX_RANKS] if isinstance(rank, int) and 0 <= rank < 10_000_000])
    return ()


@lru_cache(maxsize=64)
def _ranks_in(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d{1,7}", text[: 8 * MAX_RANKS])))


def _counters(row: Any) -> tuple[int | None, int | None, int | None]:
    names = ("last_enqueued_collective", "last_started_collective", "last_completed_collective")
    return tuple(_count(_mapping(row).get(name)) for name in names)  # type: ignore[return-value]


def _count(value: Any) -> int | None:
    """A counter: an int in pickles, a string in JSON, -1 or 0xff… where there is none."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < 1 << 62 else None


def _mapping(value: Any) -> dict[str, Any]:
    return {_text(key): item for key, item in value.items()} if isinstance(value, dict) else {}


@lru_cache(maxsize=512)
def _start_of_year(day: int) -> float:
    return datetime(datetime.fromtimestamp(day * 86_400, UTC).year, 1, 1, tzinfo=UTC).timestamp()
