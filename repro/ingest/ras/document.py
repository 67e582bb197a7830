"""Read JSON answers of NCCL's RAS (NCCL 2.28.7 and later) into `RasAnswer`.

The counts in an answer are operations that the host launched, not operations that a device completed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from repro.ingest.ras.members import of_the_world
from repro.trace.foreign.records import Member, Note, Observation, Process, RasAnswer, RasCommunicator, Source

MAX_COMMUNICATORS, MAX_RANKS = 10_000, 200_000


def is_answer(content: Any) -> bool:
    """Whether a JSON document is an answer of NCCL's RAS."""
    return isinstance(content, dict) and "communicators" in content and ("ras" in content or "nccl_version" in content)


def read(content: Any, file: str) -> Iterator[Observation]:
    communicators, members = [], []
    for row in _dicts(content.get("communicators"))[:MAX_COMMUNICATORS]:
        name = str(row.get("hash", "")).removeprefix("0x").rjust(16, "0")
        ranks = [rank for rank in _dicts(row.get("ranks")) if _is_rank(rank.get("rank"))]
        launched: dict[str, dict[int, int]] = {}
        for rank in ranks:
            counts = rank.get("collective_counts")
            for op, count in counts.items() if isinstance(counts, dict) else ():
                if isinstance(count, int):
                    launched.setdefault(str(op)[:64], {})[rank["rank"]] = count
        differing = any(len(set(counts.values())) > 1 for counts in launched.values())
        missing = [rank for rank in _dicts(row.get("missing_ranks")) if _is_rank(rank.get("rank"))]
        size = row["size"] if _is_rank(row.get("size")) else len(ranks)
        errors = [word for word, on in (("INCOMPLETE", missing), ("MISMATCH", differing)) if on]
        absent = tuple(rank["rank"] for rank in missing)
        communicators.append(
            RasCommunicator(f"({name})", size, _status(ranks), ",".join(errors) or "OK", launched, {}, absent)
        )
        for rank in (*ranks, *missing):
            if isinstance(rank.get("pid"), int):
                process, host = Process(rank["pid"]), str(rank.get("host", ""))
                members.append(Member(process, host, f"({name})", "", rank["rank"], size, "", Source(file)))
            status = rank.get("status")
            if isinstance(status, dict) and (status.get("considered_dead") or status.get("unresponsive")):
                state = "is dead" if status.get("considered_dead") else "does not answer"
                words = f"NCCL's RAS: rank {rank['rank']} of communicator ({name}) {state}"
                yield Note(
                    "ras",
                    words,
                    Process(rank["pid"] if isinstance(rank.get("pid"), int) else None),
                    state,
                    None,
                    Source(file),
                )
    yield from of_the_world(members, communicators)
    order = str(content.get("timestamp", file))
    yield RasAnswer(tuple(communicators), str(content.get("nccl_version", "")), order, Source(file))


def _status(ranks: Iterable[dict[str, Any]]) -> str:
    """Return the status of a communicator from the flags of its ranks: ABORT, FINALIZE, INIT or RUNNING.

    If the flags of the ranks differ, the first of these words counts. RAS's text format has the same words.
    """
    found = {"RUNNING"}
    for rank in ranks:
        status = rank.get("status")
        if isinstance(status, dict):
            if status.get("abort_flag"):
                found.add("ABORT")
            elif status.get("finalize_called") or status.get("destroy_flag"):
                found.add("FINALIZE")
            elif status.get("init_state") not in (None, 0, "ncclSuccess", "0"):
                found.add("INIT")
    return next(word for word in ("ABORT", "FINALIZE", "INIT", "RUNNING") if word in found)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value[:MAX_RANKS] if isinstance(item, dict)] if isinstance(value, list) else []


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10_000_000
