"""Answers of NCCL's RAS (2.24 and later), text and JSON, to `RasAnswer`.

Counts are launches by the host: OK says nothing of what the devices completed. The text lists the smaller set of
ranks one by one, ahead or behind: to be listed is no finding. It holds no time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from repro.trace.observed import RasAnswer, RasCommunicator, Source

_GROUP_ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+([\d-]+)\s+([\d-]+)\s+([\d-]+)\s+([\d-]+)\s+(\w[\w,]*)\s+(\w[\w,]*)\s*$")
_COMMUNICATOR = re.compile(r"^#(\d+)-(\d+) \(([0-9a-f]+)\)\s+([\w,]+)")
_DIFFERENT = re.compile(r"Communicator ranks have different (?:(\w+) operation|collective operation|operation) counts")
_MANY = re.compile(r"^\s*(\d+) ranks? (?:have|has) (?:launched up to operation (\d+)|not launched any operations)")
_ONE = re.compile(
    r"^\s*Rank (\d+)(?: has launched up to operation (\d+)| has not launched any operations)? *(?:--|\[|$)"
)
_MISSING = re.compile(r"^\s*Rank (\d+) .*(?:missing|DEAD|TIMEOUT|unresponsive)")


def looks_like(head: str) -> bool:
    return "Job summary" in head and "Communicators..." in head


def looks_like_json(content: Any) -> bool:
    return isinstance(content, dict) and "communicators" in content and ("ras" in content or "nccl_version" in content)


def read(lines: Iterable[str], file: str) -> RasAnswer:
    rows: list[tuple[int, str, str]] = []
    version, current, op = "", "", ""
    named: dict[str, RasCommunicator] = {}
    count: int | None = None
    left = 0
    for line in lines:
        if line.startswith("NCCL version ") and not version:
            version = line.split()[2]
        elif match := _GROUP_ROW.match(line):
            rows.append((int(match[6].rpartition("-")[2]), match[7], match[8]))
        elif match := _COMMUNICATOR.match(line):
            current, op, count = f"#{match[1]}-{match[2]} ({match[3]})", "", None
            size = rows[int(match[1])][0] if int(match[1]) < len(rows) else 0
            status = rows[int(match[1])][1] if int(match[1]) < len(rows) else ""
            named.setdefault(current, RasCommunicator(current, size, status, match[4]))
        elif match := _DIFFERENT.search(line):
            op = match[1] or "collectives"
        elif current and op and (match := _MANY.match(line)):
            count, left = int(match[2] or 0), int(match[1])
            if left > 1 or len(named[current].others) == 0:
                named[current].others.setdefault(f"{op} {count}", (left, count))
        elif current and op and (match := _ONE.match(line)):
            launches = int(match[2]) if match[2] is not None else count if count is not None else 0
            named[current].launched.setdefault(op, {})[int(match[1])] = launches
    listed = {int(name[1:].split("-")[0]) for name in named}
    whole = [
        RasCommunicator(f"group {index}", size, status, errors)
        for index, (size, status, errors) in enumerate(rows)
        if index not in listed
    ]
    return RasAnswer((*named.values(), *whole), version, file, Source(file))


def read_json(content: Any, file: str) -> RasAnswer:
    communicators = []
    for row in content.get("communicators", [])[:10_000] if isinstance(content.get("communicators"), list) else []:
        if not isinstance(row, dict):
            continue
        launched: dict[str, dict[int, int]] = {}
        ranks = [rank for rank in row.get("ranks", []) if isinstance(rank, dict)]
        for rank in ranks:
            counts = rank.get("collective_counts")
            for op, count in counts.items() if isinstance(counts, dict) else ():
                if isinstance(count, int) and isinstance(rank.get("rank"), int):
                    launched.setdefault(str(op), {})[rank["rank"]] = count
        differing = {op: counts for op, counts in launched.items() if len(set(counts.values())) > 1}
        missing = tuple(
            rank["rank"]
            for rank in row.get("missing_ranks", [])
            if isinstance(rank, dict) and isinstance(rank.get("rank"), int)
        )
        stated = row.get("size")
        size = stated if isinstance(stated, int) else len(ranks)
        errors = "INCOMPLETE" if missing else "MISMATCH" if differing else "OK"
        communicators.append(RasCommunicator(str(row.get("hash", "")), size, "RUNNING", errors, launched, {}, missing))
    return RasAnswer(
        tuple(communicators), str(content.get("nccl_version", "")), str(content.get("timestamp", file)), Source(file)
    )
