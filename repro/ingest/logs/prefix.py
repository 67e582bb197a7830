"""Read the prefix of a log line, which says which process wrote the line and when.

The styles of torch, vLLM, SGLang, Ray, NCCL and Kubernetes are known. A line can have several prefixes:
"(RayWorkerWrapper pid=4108, ip=10.0.0.42) [rank8]:[W808 14:02:18…". A time is converted to seconds since the start of
the year, because most styles have no year and no time zone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from repro.ingest.names.processes import rank_in, role_of
from repro.trace.foreign.records import Process

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_DAYS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
_MONTHS = {
    name: i
    for i, name in enumerate(("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1)
}

_CLOCK = r"(\d{2}):(\d{2}):(\d{2})(?:[.,](\d{1,12}))?"
_GLOG = re.compile(rf"\[?([IWEF])(1[0-2]|0?[1-9])(\d{{2}}) {_CLOCK} ")  # "W808": level W, month 8, day 08
_ISO = re.compile(rf"(?:\d{{4}})-(\d{{2}})-(\d{{2}})[T ]{_CLOCK}")
_VLLM = re.compile(rf"\b(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) (\d{{2}})-(\d{{2}}) {_CLOCK} ")
_TRT = re.compile(rf"\[(\d{{2}})/(\d{{2}})/\d{{4}}-{_CLOCK}\]")
_SYSLOG = re.compile(rf"^([A-Z][a-z]{{2}}) +(\d{{1,2}}) {_CLOCK} ")
_CTIME = re.compile(rf"\[?(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) ([A-Z][a-z]{{2}}) +(\d{{1,2}}) {_CLOCK} \d{{4}}\]?")

_RANK = re.compile(r"^\s*\[(?:rank|default)(\d{1,12})\]:?|^\[\d+,(\d{1,12})\]<std(?:out|err)>:?")
_RANK_ANYWHERE = re.compile(r"\[rank(\d{1,12})\]:|\[RANK (\d{1,12})\]")
_ACTOR = re.compile(r"\(([A-Za-z_]\w*?(?:_\w+)?) (?:rank=(\d{1,12}) )?pid=(\d{1,12})(?:, ip=[\d.a-fA-F:]+)?\)")
_SGLANG = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d((?: (?:DP|PP|TP|EP|ATTN|MOE)\w*\d+)+)\]")
_NCCL = re.compile(r"^\S+?:(\d{1,12}):\d+ \[(\d{1,12})\] (?:\S+ )?NCCL ")
_ONE_WRITER = (
    r"(?:\d{4}-\d\d-\d\dT[\d:.]+Z? (?:std(?:out|err) [FP] )?|\(\w+(?: rank=\d+)? pid=\d+(?:, ip=[^)]*)?\) ?|"
    r"\[(?:rank|default)\d+\]:? ?|\[\d+,\d+\]<std(?:out|err)>: ?)"
)
_WRITER = re.compile(f"{_ONE_WRITER}{{1,6}}")


@dataclass(frozen=True, slots=True)
class Line:
    """A log line.

    number    the number of the line in its file, from 1
    text      the line without colour codes
    process   the process that wrote the line
    at_s      the time stamp of the line, in seconds since the start of its year; None if the line has no time stamp
    """

    number: int
    text: str
    process: Process
    at_s: float | None


def parse(number: int, raw: str, owner: Process) -> Line:
    """Parse a line of a log file.

    number: the number of the line in the file; raw: the line as it is in the file
    owner: the process to which the file belongs. A line that names no process was written by the owner.
    """
    text = _ANSI.sub("", raw).rstrip("\r\n") if "\x1b" in raw else raw.rstrip("\r\n")
    head = text[:240]
    return Line(number, text, writer_of(head, owner), time_of(head))


def split_writer(raw: str) -> tuple[str, str]:
    """Split a line into its text and the prefix that names its writer: "[rank3]: File …" -> ("File …", "[rank3]: ").

    The prefix is "" if the line has none. Colour codes are removed.
    """
    text = _ANSI.sub("", raw) if "\x1b" in raw else raw
    match = _WRITER.match(text)
    return (text[match.end() :], match[0]) if match else (text, "")


def writer_of(head: str, owner: Process) -> Process:
    """Return the process that the start of a line names; `owner`, the process of the whole file, if it names none."""
    rank: int | None = None
    title, pid = "", None
    if match := _RANK.match(head) or _RANK_ANYWHERE.search(head):
        rank = int(match[1] or match[2])
    actors = _ACTOR.findall(head)
    if actors:
        title, numbered, number = actors[-1]
        pid = int(number)
        if rank is None:
            rank = int(numbered) if numbered else rank_in(title)
    elif match := _SGLANG.match(head):
        title = "scheduler_" + "_".join(match.group(1).split())
        rank = rank_in(title) if rank is None else rank
    elif match := _NCCL.match(head):
        pid = int(match.group(1))
    if rank is None and not title and pid is None:
        return owner
    return Process(
        pid, title, owner.rank if rank is None and not title else rank, role_of(title) or ("" if title else owner.role)
    )


@lru_cache(maxsize=8192)
def time_of(head: str) -> float | None:
    """Return the time at the start of a line, in seconds since the start of its year; None if it has no valid time."""
    if match := _GLOG.search(head):
        return _seconds(int(match[2]), int(match[3]), *match.group(4, 5, 6, 7))
    if match := _ISO.search(head):
        return _seconds(int(match[1]), int(match[2]), *match.group(3, 4, 5, 6))
    if match := _VLLM.search(head) or _TRT.search(head):
        return _seconds(int(match[1]), int(match[2]), *match.group(3, 4, 5, 6))
    if match := _SYSLOG.search(head) or _CTIME.search(head):
        return _seconds(_MONTHS.get(match[1].lower(), 0), int(match[2]), *match.group(3, 4, 5, 6))
    return None


def _seconds(month: int, day: int, hour: str, minute: str, second: str, fraction: str | None) -> float | None:
    if not (1 <= month <= 12 and 1 <= day <= 31 and int(hour) < 24 and int(minute) < 60 and int(second) <= 60):
        return None
    days = _DAYS[month - 1] + day - 1
    part = float(f"0.{fraction[:9]}") if fraction else 0.0
    return days * 86400 + int(hour) * 3600 + int(minute) * 60 + int(second) + part
