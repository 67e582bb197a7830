"""Answers of NCCL's RAS (2.24 and later), text and JSON, to `RasAnswer`; lines of its monitor mode (2.29) to notes.

Counts are launches by the host: OK says nothing of what the devices completed. The text lists the smaller set of
ranks one by one, ahead or behind: to be listed is no finding. It holds no time. No answer at all is a finding too: the
thread that answers is starved or gone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repro.ingest.logs.prefix import Line
from repro.trace.observed import Member, Note, Observation, Process, RasAnswer, RasCommunicator, Source

NEEDLES = ("PEER_DEAD", "PEER_UNRESPONSIVE", "PEER_CONNECTED", "PEER_RECOVERED")
MAX_COMMUNICATORS, MAX_RANKS = 10_000, 200_000

_ROW = re.compile(
    r"^\s*(\d{1,12})\s+(\d{1,12})\s+([\d-]+)\s+([\d-]+)\s+([\d-]+)\s+([\d-]+)\s+([A-Z,]+)\s+([A-Z,]+)\s*$"
)
_COMMUNICATOR = re.compile(r"^#(\d{1,12})-(\d{1,12}) \(([0-9a-f]+)\)\s+([\w,]+)")
_DIFFERENT = re.compile(r"Communicator ranks have different (?:collective operation|(\w+) operation|operation) counts")
_SECTION = re.compile(r"^\s*(?:Communicator ranks have different status|Missing communicator data)")
_MANY = re.compile(
    r"^\s*(\d{1,12}) ranks? (?:have|has) (?:launched up to operation (\d{1,12})|not launched any operations)"
)
_ONE = re.compile(
    r"^\s*Rank (\d{1,12})(?: has launched up to operation (\d{1,12})| has not launched any operations)? *(?:--|\[|$)"
)
_MISSING = re.compile(r"^\s*The missing ranks?: ([\d, -]+)")
_PROCESS = re.compile(r"managed by process (\d{1,12}) on node (\S+)")
_DEAD = re.compile(r"^\s*Process (\d{1,12}) on node (\S+) managing (.*)$")
_TIMEOUTS = re.compile(r"Encountered (\d{1,12}) communication timeouts?")
_MONITOR = re.compile(r"(PEER_\w+): (?:Process (\d{1,12}))?(.{0,120})")
_NO_ANSWER = re.compile(
    r"(?i)connection refused|timed out|connection reset|no route to host|failed to connect|not running"
)


@dataclass(slots=True)
class _Communicator:
    """One communicator while its lines are read."""

    row: RasCommunicator
    missing: list[int] = field(default_factory=list)
    operation: str = ""
    count: int | None = None
    section: str = ""


def looks_like(head: str) -> bool:
    return "Job summary" in head and "Communicators..." in head


def looks_like_json(content: Any) -> bool:
    return isinstance(content, dict) and "communicators" in content and ("ras" in content or "nccl_version" in content)


def no_answer(file: str, text: str) -> Note | None:
    """A note where a file that is named after RAS holds no answer: it is empty, or holds an error of the client."""
    if not re.search(r"ras(?![a-z])", file.rpartition("/")[2].lower()) or len(text) > 4096:
        return None
    why = next((line.strip() for line in text.splitlines() if _NO_ANSWER.search(line)), "")
    if text.strip() and not why:
        return None
    words = (
        f"NCCL's RAS gave no answer ({why[:120] or 'empty'}): its thread has no processor time, or the process is gone"
    )
    return Note("ras", words, source=Source(file, "line 1"))


def read(lines: Iterable[str], file: str) -> Iterator[Observation]:
    rows: list[RasCommunicator] = []
    named: dict[str, _Communicator] = {}
    current: _Communicator | None = None
    members: list[Member] = []
    version, alone, timeouts = "", "", 0
    for number, line in enumerate(lines, 1):
        source = Source(file, f"line {number}")
        if line.startswith("NCCL version ") and not version:
            version = line.split()[2]
        elif match := _ROW.match(line):
            size = int(match[5].rpartition("-")[2])
            rows.append(RasCommunicator(f"group {match[1]}", size, match[7], match[8]))
        elif match := _COMMUNICATOR.match(line):
            name, group, alone = f"#{match[1]}-{match[2]} ({match[3]})", int(match[1]), ""
            table = rows[group] if group < len(rows) else RasCommunicator("", 0, "", "")
            row = RasCommunicator(name, table.size, table.status, match[4])
            current = named.setdefault(name, _Communicator(row))
            current.operation, current.count, current.section = "", None, match[4]
        elif line.strip() in ("INCOMPLETE", "TIMEOUT", "DEAD", "Errors", "Warnings"):
            current, alone = None, line.strip()
        elif match := _TIMEOUTS.search(line):
            timeouts = int(match[1])
        elif match := _DEAD.match(line):
            state = "is dead" if alone == "DEAD" else "does not answer"
            words = f"NCCL's RAS: process {match[1]} on {match[2]} ({match[3].strip()[:40]}) {state}"
            yield Note("ras", words, Process(int(match[1])), alone, None, source)
        elif current is not None:
            _communicator_line(line, current)
            if (one := _ONE.match(line)) and (owner := _PROCESS.search(line)):
                process, row = Process(int(owner[1])), current.row
                members.append(Member(process, owner[2], row.name, "", int(one[1]), row.size, "", source))
    if timeouts:
        words = f"NCCL's RAS ran into {timeouts} time-outs while it collected: what is missing is no absence"
        yield Note("ras", words, Process(), str(timeouts), None, Source(file))
    listed = {int(name[1:].split("-")[0]) for name in named}
    whole = [row for index, row in enumerate(rows) if index not in listed]
    shown = [replace(it.row, missing=tuple(it.missing)) for it in named.values()]
    yield from _of_the_world(members, rows)
    yield RasAnswer((*shown, *whole), version, file, Source(file))


def _of_the_world(members: Iterable[Member], communicators: Sequence[RasCommunicator]) -> list[Member]:
    """The members of the one communicator that is larger than all others: their numbers there are global ranks."""
    sizes = sorted((row.size for row in communicators), reverse=True)
    if not sizes or sizes[1:2] == sizes[:1]:
        return []
    return [member for member in members if member.size == sizes[0]]


def _communicator_line(line: str, current: _Communicator) -> None:
    row, op = current.row, current.operation
    if match := _DIFFERENT.search(line):
        current.operation, current.count = match[1] or "collectives", None
    elif match := _MISSING.match(line):
        current.missing += _ranks(match[1])
    elif _SECTION.match(line):
        current.operation, current.section = "", "INCOMPLETE" if "Missing" in line else "STATUS"
    elif op and (match := _MANY.match(line)):
        current.count, left = int(match[2] or 0), int(match[1])
        if left > 1 or not row.others:
            row.others.setdefault(f"{op} {current.count}", (left, current.count))
    elif match := _ONE.match(line):
        rank = int(match[1])
        if op:
            counted = 0 if "has not launched" in line else current.count or 0
            launches = int(match[2]) if match[2] is not None else counted
            row.launched.setdefault(op, {})[rank] = launches
        elif current.section == "INCOMPLETE":
            current.missing.append(rank)


def _ranks(text: str) -> list[int]:
    """ "3, 5-7" -> [3, 5, 6, 7]"""
    ranks: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and int(first) < MAX_RANKS:
            ranks += range(int(first), min(int(last) if last.isdigit() else int(first), MAX_RANKS) + 1)
    return ranks


def read_line(line: Line, source: Source) -> Iterator[Observation]:
    """A line of RAS's monitor mode."""
    if match := _MONITOR.search(line.text):
        pid = int(match[2]) if match[2] else None
        words = f"NCCL's RAS: {match[1]} {match[2] or ''}{match[3]}".strip()
        yield Note("ras", words, Process(pid), match[1].removeprefix("PEER_"), line.at_s, source)


def read_json(content: Any, file: str) -> Iterator[Observation]:
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
    yield from _of_the_world(members, communicators)
    order = str(content.get("timestamp", file))
    yield RasAnswer(tuple(communicators), str(content.get("nccl_version", "")), order, Source(file))


def _status(ranks: Iterable[dict[str, Any]]) -> str:
    """The status of a communicator by its ranks' flags, as the text prints it."""
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
