"""Read PyTorch Flight Recorder dumps into `RecorderDump`.

Dumps are pickles or JSON, of the format versions 2.0 to 2.10. A nightly build of 2023 wrote only the list of entries.
The format is defined in torch/csrc/distributed/c10d/FlightRecorder.hpp and its pickler, torch 2.2 to 2.13.

What the format does not say by itself:

- A dump does not contain its rank. The rank is the last number in the file's name.
- The field `state` stays "scheduled" on gloo and in dumps of TorchComms. In these dumps, only `retired` shows that an
  operation is over. On NCCL, an operation that is retired but not completed ran into its time-out.
- Except on gloo, a collective is over if a later collective of the same group has completed, whatever `state` says.
- The parts of a coalesced operation are never marked as completed. They are over when the whole operation is over.
- The keys of `pg_config` are the groups' names, and the keys of `pg_status` are the groups' ids. An entry has the name
  and the id of its group. In gloo dumps, `pg_config` is empty.
- In the names of sends and receives ("recv 1<-0"), the numbers are group ranks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from hybrid_moe_ref.files import DamagedFile, parse_json
from repro.ingest.recorder import pickles
from repro.ingest.recorder.entries import (
    MAX_GROUPS,
    Columns,
    backend_of,
    by_group,
    complete_the_earlier,
    knowledge_of,
    short_text,
)
from repro.trace.foreign.operations import NO_CALLS
from repro.trace.foreign.records import Group, GroupRecord, RecorderDump, Source

MAX_ENTRIES = 50_000
MAX_RANKS = 131_072

_LAST_NUMBER = re.compile(r"(\d{1,7})\D*$")


class NotARecorderDump(ValueError):
    """The content is not a Flight Recorder dump. Possibly a different reader understands the file."""


def looks_like(head: bytes) -> bool:
    """Whether the first bytes of a file look like those of a Flight Recorder dump."""
    if head[:1] == b"\x80":
        return True
    start = head.lstrip()[:4096]
    return start[:1] in (b"{", b"[") and (b'"pg_config"' in head or b'"entries"' in head or b'"profiling_name"' in head)


def rank_of(name: str) -> int | None:
    """Return the rank in a file name, such as 7 in "nccl_trace_rank_7" or 5 in "trace_rank_host_5.pkl".

    None if the name has no such number.
    """
    stem = name.rpartition("/")[2][-200:]
    stem = re.sub(r"(\.(pkl|pickle|json|bin|dump|trace|pt))+$", "", stem)
    labelled = re.findall(r"rank[_\-]?(\d{1,7})(?=[._\-]|$)", stem)
    found = _LAST_NUMBER.search(stem)
    if len(labelled) == 1 and not (found and stem.endswith(found.group(1))):
        return int(labelled[0])
    return int(found.group(1)) if found else None


def read(data: bytes, file: str, rank: int | None = None) -> RecorderDump:
    """Read one dump.

    data   the content of the file
    file   the name of the file
    rank   the rank that wrote the dump; None: the number at the end of the file's name

    Raises NotARecorderDump if the content is something else. Raises DamagedFile ("file:offset: problem") if the dump is
    damaged, or if the rank is not known.
    """
    if data[:1] == b"\x80":
        content = pickles.load(data, file)
    else:
        content = parse_json(data, file)
    if isinstance(content, list):  # a nightly build of 2023 dumped only the list of entries
        content = {"entries": content}
    if not isinstance(content, dict) or not {"entries", "pg_config", "pg_status"} & content.keys():
        raise NotARecorderDump("the file contains neither entries nor groups")
    rank = rank_of(file) if rank is None else rank
    if rank is None:
        raise DamagedFile(
            f"{file}:0: the file's name does not end in a number, so the rank is not known: rename the file to …_rank_N"
        )
    return _dump(content, file, rank)


def _dump(content: Mapping[str, Any], file: str, rank: int) -> RecorderDump:
    entries = content.get("entries") or []
    if not isinstance(entries, list):
        raise DamagedFile(f"{file}:0: entries is not a list")
    entries = [entry for entry in entries[-MAX_ENTRIES:] if isinstance(entry, dict)]
    config = _mapping(content.get("pg_config"))
    status = _mapping(content.get("pg_status"))
    rows, order = by_group(entries)
    known = Columns(file, entries)
    records = []
    for (pg_id, name, description), row in rows.items():
        group = _group(name, description, config)
        complete_the_earlier(row)
        enqueued, _, completed = _counters(status.get(pg_id))
        records.append(GroupRecord(group, known.calls(row, group), enqueued, completed, pg_id))
    seen = {pg_id for pg_id, *_ in rows}
    # groups with counters but without entries: they were overwritten, or left out because all operations are over
    for pg_id, counters in status.items():
        if pg_id not in seen:
            enqueued, _, completed = _counters(counters)
            records.append(GroupRecord(Group(""), NO_CALLS, enqueued, completed, pg_id))
    first = entries[0].get("record_id") if entries else 0
    return RecorderDump(
        rank,
        tuple(records),
        order,
        tuple(_group(name, "", config) for name in list(config)[:MAX_GROUPS] if name),
        next((backend_of(entry) for entry in entries), ""),
        short_text(content.get("comm_lib_version") or content.get("nccl_version")),
        first != 0,  # if entries have no numbers, older entries may have been overwritten
        max((at for record in records for call in record.calls[-1:] if (at := call.at_s) is not None), default=None),
        Source(file),
        knowledge_of(entries),
    )


def _group(name: str, description: str, config: Mapping[str, Any]) -> Group:
    known = config.get(name)
    known = known if isinstance(known, dict) else {}
    described = short_text(known.get("desc"))
    if description in ("", "undefined") and described:
        description = described
    return Group(name, description, _members(known.get("ranks")))


def _members(ranks: Any) -> tuple[int, ...]:
    """Parse the ranks of a group in `pg_config`: a text "[0, 1]", or a list in dumps of TorchComms."""
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
    """Parse a counter of `pg_status`: an int in pickles, a string in JSON.

    Return None for -1 and 0xff…, which mean that the counter has no value yet.
    """
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if 0 <= number < 1 << 62 else None


def _mapping(value: Any) -> dict[str, Any]:
    return {short_text(key): item for key, item in value.items()} if isinstance(value, dict) else {}
