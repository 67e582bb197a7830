"""PyTorch's Flight Recorder dumps (pickle or JSON, versions 2.0 to 2.10, and the bare list of 2023) to `RecorderDump`.

Source of the format: torch/csrc/distributed/c10d/FlightRecorder.hpp and its pickler, torch 2.2 to 2.13.

What a reader must know, and what this one does about it:

- Nothing in a dump says whose it is: the rank is the last number in the file's name.
- On gloo `state` stays "scheduled" for ever; only `retired` tells. On NCCL an operation that is retired but not
  completed ran into its time-out, and one that is followed by a completed one of its group is over whatever its state
  says, as   operations inside a coalesced group have no events of their own.
- `pg_config` is keyed by a group's name, `pg_status` by its id: the entries join the two. In gloo dumps `pg_config`
  is empty.
- The names of transfers ("recv 1<-0") count ranks of the group.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.ingest import pickles
from repro.ingest.operations import operation
from repro.trace.observed import Call, Group, GroupRecord, RecorderDump, Source

MAX_ENTRIES = 50_000
MAX_FRAMES, MAX_TENSORS, MAX_DIMENSIONS = 24, 64, 16

_TRANSFER = re.compile(r"(send|recv) (\d+)(?:->|<-)(\d+)")
_LAST_NUMBER = re.compile(r"(\d+)\D*$")


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
    stem = name.rpartition("/")[2]
    stem = re.sub(r"(\.(pkl|pickle|json|bin|dump|trace|pt))+$", "", stem)
    labelled = re.findall(r"rank[_\-]?(\d+)(?=[._\-]|$)", stem)
    found = _LAST_NUMBER.search(stem)
    if len(labelled) == 1 and not (found and stem.endswith(found.group(1))):
        return int(labelled[0])
    return int(found.group(1)) if found else None


def read(data: bytes, file: str, rank: int | None = None) -> RecorderDump:
    """One dump. Raises NotARecorderDump for other files, ValueError (with a place) for a damaged one."""
    if data[:1] == b"\x80":
        content = pickles.load(data)
    else:
        try:
            content = parse_json(data, file)
        except DamagedFile as error:
            raise ValueError(f"it is no readable JSON ({error})") from None
    if isinstance(content, list):  # a nightly of 2023 dumped the entries alone
        content = {"entries": content}
    if not isinstance(content, dict) or not {"entries", "pg_config", "pg_status"} & content.keys():
        raise NotARecorderDump("neither entries nor groups are in it")
    rank = rank_of(file) if rank is None else rank
    if rank is None:
        raise ValueError("its name ends in no number, so whose dump it is cannot be known: name it …_rank_N")
    return _dump(content, file, rank)


def _dump(content: Mapping[str, Any], file: str, rank: int) -> RecorderDump:
    entries = content.get("entries") or []
    if not isinstance(entries, list):
        raise ValueError("entries is not a list")
    entries = [entry for entry in entries[-MAX_ENTRIES:] if isinstance(entry, dict)]
    config = _mapping(content.get("pg_config"))
    status = _mapping(content.get("pg_status"))
    backend = next((str(e.get("profiling_name", "")).partition(":")[0] for e in entries), "")
    groups: dict[tuple[str, str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    for place, entry in enumerate(entries):
        groups.setdefault(_group_key(entry), []).append((place, entry))
    records, where = [], {}
    for index, ((pg_id, name, description), rows) in enumerate(groups.items()):
        group = _group(name, description, config)
        calls = _calls(rows, group, backend, file)
        enqueued, _, completed = _counters(status.get(pg_id))
        records.append(GroupRecord(group, tuple(calls), enqueued, completed, pg_id))
        where.update({place: (index, position) for position, (place, _) in enumerate(rows)})
    seen = {pg_id for pg_id, *_ in groups}
    for pg_id, row in status.items():  # groups whose entries were overwritten, or left out as all are over
        if pg_id not in seen:
            enqueued, _, completed = _counters(row)
            records.append(GroupRecord(Group(""), (), enqueued, completed, pg_id))
    first = entries[0].get("record_id", 0) if entries else 0
    return RecorderDump(
        rank,
        tuple(records),
        tuple(where[place] for place in sorted(where)),
        tuple(_group(name, "", config) for name in config if name),
        backend,
        str(content.get("comm_lib_version") or content.get("nccl_version") or ""),
        isinstance(first, int) and first > 0,
        max((at for e in entries if (at := seconds_of_year(e.get("time_created_ns"))) is not None), default=None),
        Source(file),
    )


def _group_key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    pair = entry.get("process_group")
    name, description = "", ""
    if isinstance(pair, (list, tuple)) and pair:
        name, description = str(pair[0]), str(pair[1]) if len(pair) > 1 else ""
    return str(entry.get("pg_id", "")), name or str(entry.get("pg_name", "")), description


def _group(name: str, description: str, config: Mapping[str, Any]) -> Group:
    known = _mapping(config.get(name))
    described = str(known.get("desc") or "")
    if description in ("", "undefined") and described:
        description = described
    return Group(name, description, _members(known.get("ranks")))


def _members(ranks: Any) -> tuple[int, ...]:
    """The ranks of a group: "[0, 1]" in every version, a list in TorchComms' dumps."""
    if isinstance(ranks, str):
        return tuple(int(number) for number in re.findall(r"\d{1,7}", ranks[:1_000_000]))
    if isinstance(ranks, (list, tuple)):
        return tuple(rank for rank in ranks if isinstance(rank, int))
    return ()


def _counters(row: Any) -> tuple[int | None, int | None, int | None]:
    names = ("last_enqueued_collective", "last_started_collective", "last_completed_collective")
    return tuple(_count(_mapping(row).get(name)) for name in names)  # type: ignore[return-value]


def _count(value: Any) -> int | None:
    """A counter: an int in pickles, a string in JSON, -1 or 0xff… where there is none."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < 1 << 62 else None


def _calls(rows: Sequence[tuple[int, Mapping[str, Any]]], group: Group, backend: str, file: str) -> list[Call]:
    over = [_is_over(entry, backend) for _, entry in rows]
    if backend != "gloo":
        _complete_the_earlier(rows, over)
    frames: dict[tuple[int, ...], tuple[str, ...]] = {}
    return [
        _call(entry, done, group, frames, Source(file, f"entry {entry.get('record_id', place)}"))
        for (place, entry), done in zip(rows, over, strict=True)
    ]


def _is_over(entry: Mapping[str, Any], backend: str) -> bool:
    state, retired = entry.get("state"), bool(entry.get("retired"))
    if backend == "nccl" and retired and state != "completed" and not entry.get("time_discovered_completed_ns"):
        return state not in ("scheduled", "started")  # taken off the list by the time-out
    return retired or state == "completed"


def _complete_the_earlier(rows: Sequence[tuple[int, Mapping[str, Any]]], over: list[bool]) -> None:
    """Collectives of a group complete in their order: what stands before a completed one is over."""
    later = False
    for index in range(len(rows) - 1, -1, -1):
        if rows[index][1].get("is_p2p"):
            continue
        later = later or over[index]
        over[index] = later


def _call(
    entry: Mapping[str, Any],
    done: bool,
    group: Group,
    known_frames: dict[tuple[int, ...], tuple[str, ...]],
    source: Source,
) -> Call:
    name = str(entry.get("profiling_name", ""))
    op, peer = operation(name), None
    if " " in name and (transfer := _TRANSFER.search(name)):
        op = transfer.group(1)
        other = int(transfer.group(3))
        peer = group.members[other] if other < len(group.members) else None if group.members else other
    is_transfer = bool(entry.get("is_p2p")) or op in ("send", "recv")
    seq = entry.get("collective_seq_id", entry.get("seq_id"))
    return Call(
        op,
        seq if isinstance(seq, int) and not is_transfer else None,
        _shared(_sizes(entry.get("input_sizes")) + _sizes(entry.get("output_sizes"))),
        _shared(_words(entry.get("input_dtypes")) + _words(entry.get("output_dtypes"))),
        peer,
        _frames(entry.get("frames"), known_frames),
        done,
        seconds_of_year(entry.get("time_created_ns")),
        source,
    )


@lru_cache(maxsize=65_536)
def _shared(value: Any) -> Any:
    """The same object for equal values of all ranks: a comparison of two calls is then one of two addresses."""
    return value


def _sizes(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (list, tuple)):
        return ()
    rows = [row[:MAX_DIMENSIONS] for row in value[:MAX_TENSORS] if isinstance(row, (list, tuple))]
    return tuple([tuple([n for n in row if isinstance(n, int)]) for row in rows])


def _words(value: Any) -> tuple[str, ...]:
    return tuple([str(word)[:64] for word in value[:MAX_TENSORS]]) if isinstance(value, (list, tuple)) else ()


def _frames(value: Any, known: dict[tuple[int, ...], tuple[str, ...]]) -> tuple[str, ...]:
    """The innermost frames. torch writes a frame that many entries share once, so its address tells it again."""
    if not isinstance(value, (list, tuple)) or not value:
        return ()
    key = tuple(map(id, value[:MAX_FRAMES]))
    frames = known.get(key)
    if frames is None:
        rows = [frame for frame in value[:MAX_FRAMES] if isinstance(frame, dict)]
        frames = known[key] = tuple(
            [sys.intern(f"{row.get('name', '?')} ({row.get('filename', '?')}:{row.get('line', '?')})") for row in rows]
        )
    return frames


def _mapping(value: Any) -> dict[str, Any]:
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def seconds_of_year(wall_ns: Any) -> float | None:
    """Seconds since the start of the year (UTC) of a wall time in nanoseconds; None for no time."""
    if not isinstance(wall_ns, int) or not 0 < wall_ns < 1 << 62:
        return None
    seconds = wall_ns / 1e9
    return seconds - _start_of_year(int(seconds // 86_400))


@lru_cache(maxsize=512)
def _start_of_year(day: int) -> float:
    return datetime(datetime.fromtimestamp(day * 86_400, UTC).year, 1, 1, tzinfo=UTC).timestamp()
