"""Read lines of torch's NCCL watchdog (torch 1.12 to 2.13) and of backends that copied it (HCCL, MCCL, CNCL, XCCL).

In such a line, `[Rank R]`, and `Rank R` inside `[PG …]`, are group ranks. Only the prefix `[rankR]:` is a global rank.
One line reports the time-out, and a different line the counters of its group. Both lines have the number of the
operation that timed out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from repro.ingest.logs.prefix import Line
from repro.ingest.names.operations import operation
from repro.trace.foreign.records import Call, Failure, Group, Note, Observation, Progress, Source, TimedOut

NEEDLES = ("atchdog", "Timeout at ", "timed out in blocking wait", "dump signal", "signal dumping", "eartbeat monitor")

_TIMEOUT = re.compile(
    r"\[(?:PG [^\]]*?)?Rank (\d{1,12})\] [^\[]*?(?:Watchdog caught collective operation timeout: )?"
    r"Work\w{1,12}\(((?:[^()]|\(ms\)){0,400})\) "
    r"(?:ran for (\d{1,12}) milliseconds before timing out|timed out in blocking wait)"
)
_WORK = {
    "seq": re.compile(r"SeqNum=(\d{1,12})"), "op": re.compile(r"OpType=(\w+)"),
    "in": re.compile(r"NumelIn=(\d{1,12})"), "out": re.compile(r"NumelOut=(\d{1,12})"),
    "ms": re.compile(r"Timeout\(ms\)=(\d{1,12})"),
}  # fmt: skip
_PG = re.compile(r"\[PG (?:ID )?(\d{1,12})(?: ?PG GUID ([^\s(]+))?\s?(?:\((.*?)\))? Rank (\d{1,12})\]")
_STATUS = re.compile(
    r"last enqueued (?:\w+ )?work: (-?\d{1,12}), last completed (?:\w+ )?work: (-?\d{1,12})", re.IGNORECASE
)
_STUCK = re.compile(r"(?:detected by watchdog at work(?: sequence id)?|Timeout at \w+ work): (\d{1,12})")
_DUMP_FROM = re.compile(
    r"Received a dump signal due to a collective timeout from\s+(?:rank (\d{1,12})|this local rank)"
)
_DEVICE = re.compile(r"thread terminated with exception: (?:.*?)CUDA error: (.{4,80}?)(?:$|\.|\n)")
_BLOCKED = re.compile(r"Heartbeat monitor timed out|watchdog got stuck")
_GARBAGE = 1 << 31


class Watchdog:
    """Reads the watchdog's lines in one file.

    A time-out whose line does not name its group is held back until a later line names this group.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[int | None, int, int | None], TimedOut] = {}
        self._seen: set[tuple[object, ...]] = set()

    def read(self, line: Line, source: Source) -> Iterator[Observation]:
        text = line.text
        if match := _TIMEOUT.search(text):
            yield from self._timed_out(match, line, source)
        elif match := _DUMP_FROM.search(text):
            yield from _dump_signal(match, line, source)
        elif "last enqueued" in text and (group := _PG.search(text)) and (status := _STATUS.search(text)):
            yield from self._progress(group, status, line, source)
        elif match := _DEVICE.search(text):
            yield Failure(line.process, "device", "CUDA: " + match[1].strip(), line.at_s, source)
        elif _BLOCKED.search(text):
            words = "the thread of the NCCL watchdog itself is blocked (a CUDA call, or Python's lock)"
            yield Note("stuck", words, line.process, "", line.at_s, source)
        elif "First PG on this rank to signal dumping" in text:
            yield Note("watchdog", "the rank's own watchdog fired first", line.process, "own", line.at_s, source)
        elif "dump signal from another rank" in text:
            yield Note(
                "watchdog",
                "the watchdog of another rank asked this rank to dump",
                line.process,
                "other",
                line.at_s,
                source,
            )

    def finish(self) -> Iterator[Observation]:
        """Return the time-outs that are still held back because no later line named their group."""
        yield from self._waiting.values()
        self._waiting.clear()

    def _timed_out(self, match: re.Match[str], line: Line, source: Source) -> Iterator[Observation]:
        """Return the record of a time-out (``match``), or hold it back until a later line names its group.

        The exception that ends the process repeats the text of the time-out. This repetition is ignored.
        """
        work = {name: m[1] if (m := pattern.search(match[2])) else "" for name, pattern in _WORK.items()}
        sizes = tuple((int(work[key]),) for key in ("in", "out") if work[key])
        ran_s = int(match[3] or work["ms"] or 0) / 1000
        call = Call(operation(work["op"]), int(work["seq"]) if work["seq"] else None, sizes, source=source)
        since_s = line.at_s - ran_s if line.at_s is not None else None
        group_rank, group = int(match[1]), None
        if named := _PG.search(text := line.text):
            group = Group(named[2] or named[1], named[3] or "") if named.start() <= text.find("Watchdog") else None
        repeated = (group_rank, match[2], match[3])
        if repeated in self._seen and ("exception" in text or "failed due to" in text or "aborted on rank" in text):
            return
        self._seen.add(repeated)
        timed_out = TimedOut(line.process.rank, group_rank, group, call, ran_s, line.at_s, since_s, source)
        key = (line.process.rank, group_rank, call.seq)
        if group is not None or key in self._waiting:
            yield timed_out
        else:
            self._waiting[key] = timed_out

    def _progress(
        self, group: re.Match[str], status: re.Match[str], line: Line, source: Source
    ) -> Iterator[Observation]:
        named, group_rank, rank = Group(group[2] or group[1], group[3] or ""), int(group[4]), line.process.rank
        stuck = int(match[1]) if (match := _STUCK.search(line.text)) else None
        timed_out = self._waiting.pop((rank, group_rank, stuck), None) if stuck is not None else None
        if timed_out is not None:
            yield replace(timed_out, group=named)
        yield Progress(rank, group_rank, named, _work(status[1]), _work(status[2]), line.at_s, source, stuck)


def _work(number: str) -> int | None:
    """Parse a counter of operations. Return None if no operation was counted yet.

    If no operation was counted yet, torch 2.3 prints a random number, and later versions print -1.
    """
    value = int(number)
    return value if 0 <= value < _GARBAGE else None


def _dump_signal(match: re.Match[str], line: Line, source: Source) -> Iterator[Observation]:
    """Read a line about a request for a Flight Recorder dump, sent by the watchdog of this rank or of a different rank.

    Only the watchdog of process group 0 prints this line. So the counters in the line are those of the default group,
    even if a different group hangs.
    """
    origin = match[1] or "own"
    who = "its own watchdog" if origin == "own" else f"rank {origin}"
    yield Note("watchdog", f"asked to dump by {who}", line.process, origin, line.at_s, source)
    status, group = _STATUS.search(line.text), _PG.search(line.text)
    if status:
        group_rank = int(group[4]) if group else None
        default = Group("0", "default_pg")
        yield Progress(
            line.process.rank, group_rank, default, _work(status[1]), _work(status[2]), line.at_s, source
        )  # fmt: skip
