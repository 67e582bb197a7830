"""Read text answers of NCCL's RAS (NCCL 2.24 and later) into `RasAnswer`.

The counts are operations that the host launched. OK means that these counts are equal, not that the devices have
completed the operations. If the counts of the ranks differ, the text lists the smaller set of ranks. This set can be
ahead of the other ranks or behind them, so a listed rank is not always the wrong one. The text has no time stamps.

A missing answer is also evidence: the NCCL thread that should answer gets no processor time, or its process has ended.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from repro.ingest.ras.members import of_the_world
from repro.trace.foreign.records import Member, Note, Observation, Process, RasAnswer, RasCommunicator, Source

MAX_RANKS = 200_000

_VERSION = re.compile(r"NCCL version (\S{1,40})")
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
_NO_ANSWER = re.compile(
    r"(?i)connection refused|timed out|connection reset|no route to host|failed to connect|not running"
)


@dataclass(slots=True)
class _Communicator:
    """What an answer shows about one communicator, up to the current line.

    row         the record of the communicator, to which the lines add what they show

    missing     the ranks in the communicator about which the answer has no data
    operation   the operation whose counts the current lines list; "" if they list something else
    count       the number of launches in the latest line "N ranks have launched up to operation M"; None before it
    section     what the current lines are about: "INCOMPLETE" (missing ranks), "STATUS", or the communicator's errors
    """

    row: RasCommunicator
    missing: list[int] = field(default_factory=list)
    operation: str = ""
    count: int | None = None
    section: str = ""


def looks_like(head: str) -> bool:
    return "Job summary" in head and "Communicators..." in head


def no_answer(file: str, text: str) -> Note | None:
    """Return a record about a missing answer, if the file is empty or contains an error of the RAS client; else None.

    file   name of the file. If the name does not contain "ras", the result is None
    text   content of the file
    """
    if not re.search(r"ras(?![a-z])", file.rpartition("/")[2].lower()) or len(text) > 4096:
        return None
    why = next((line.strip() for line in text.splitlines() if _NO_ANSWER.search(line)), "")
    if text.strip() and not why:
        return None
    words = (
        f"NCCL's RAS gave no answer ({why[:120] or 'empty'}): its thread got no processor time, or the process has "
        "ended"
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
        if not version and (match := _VERSION.match(line)):
            version = match[1]
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
        words = (
            f"NCCL's RAS ran into {timeouts} time-outs while it collected, so ranks that are missing in its answer may "
            "be alive"
        )
        yield Note("ras", words, Process(), str(timeouts), None, Source(file))
    listed = {int(name[1:].split("-")[0]) for name in named}
    whole = [row for index, row in enumerate(rows) if index not in listed]
    shown = [replace(it.row, missing=tuple(it.missing)) for it in named.values()]
    yield from of_the_world(members, rows)
    yield RasAnswer((*shown, *whole), version, file, Source(file))


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
    """Parse a list of ranks: "3, 5-7" -> [3, 5, 6, 7]."""
    ranks: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and int(first) < MAX_RANKS:
            ranks += range(int(first), min(int(last) if last.isdigit() else int(first), MAX_RANKS) + 1)
    return ranks
