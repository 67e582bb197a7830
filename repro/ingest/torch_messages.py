"""What torch.distributed prints of a hang: NCCL watchdog lines (torch 1.12 to 2.13 and vendors' copies), the report of
TORCH_DISTRIBUTED_DEBUG=DETAIL, gloo's errors, monitored_barrier, torchrun's summary.

`[Rank R]` and `Rank R` inside `[PG …]` are ranks of that group; only the prefix `[rankR]:` is global.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.flight_recorder import operation
from repro.ingest.prefix import Line
from repro.trace.observed import (
    Call,
    Failure,
    Group,
    Left,
    Mismatch,
    Note,
    Observation,
    Process,
    Progress,
    Source,
    TimedOut,
)

NEEDLES = (
    "collective operation timeout", "enqueued NCCL work", "last enqueued work", "Detected mismatch between collectives",
    "inconsistent collective", "gloo", "Gloo",
    "monitoredBarrier", "Watchdog", "watchdog", "flight recorder dump signal",
    "Signal ", "exitcode", "local_rank", "ProcessGroupGloo", "CommWatchdog", "heartbeat",
)  # fmt: skip

_TIMEOUT = re.compile(
    r"\[Rank (\d+)\] .*?Watchdog caught collective operation timeout: Work\w+\((.*?)\) ran "
    r"for (\d+) milliseconds before timing out"
)
_WORK = {
    "seq": re.compile(r"SeqNum=(\d+)"), "op": re.compile(r"OpType=(\w+)"),
    "in": re.compile(r"NumelIn=(\d+)"), "out": re.compile(r"NumelOut=(\d+)"),
}  # fmt: skip
_PG = re.compile(r"\[PG (?:ID )?(\S+?)(?: PG GUID ([^\s(]+))?\s?(?:\(([^)]*)\))? Rank (\d+)\]")
_STATUS = re.compile(r"last enqueued (?:NCCL )?work: (-?\d+), last completed (?:NCCL )?work: (-?\d+)")
_DUMP_FROM = re.compile(r"Received a dump signal due to a collective timeout from\s+(?:rank (\d+)|this local rank)")
_DUMP_STATUS = re.compile(r"Last enqueued NCCL work: (-?\d+), last completed NCCL work: (-?\d+)")
_FINGERPRINT = re.compile(
    r"CollectiveFingerPrint\((SequenceNumber=\d+.*?)(?=, but Rank|\.Collectives differ|\. ?Collectives|$)"
)
_DETAIL = re.compile(
    r"Detected mismatch between collectives on ranks\. Rank (\d+) is running collective: "
    r"(.*?), but Rank (\d+) is running collective: (.*?)\.\s?Collectives differ in the "
    r"following aspects:\s*(.*)$"
)
_DETAIL_OLD = re.compile(r"Rank (\d+) is running inconsistent collective: (.*)$")
_GLOO = re.compile(r"\[[^\[\]]*?gloo/[^\[\]]*?:\d+\] (.*)$")
_GLOO_PEER = re.compile(
    r"(?:Connection closed by peer|Connection reset by peer|Read error|Application timeout caused pair closure)"
)
_GLOO_WAIT = re.compile(r"Timed out waiting (\d+)ms for (recv|send) operation to complete")
_GLOO_CONNECT = re.compile(r"connectFullMesh failed|timed out connecting|Connect timeout|rendezvous|Connection refused")
_GLOO_COUNT = re.compile(
    r"\[Gloo\] Rank (\d+) is connected to (\d+) peer ranks\. Expected number of connected peer ranks is : (\d+)"
)
_BARRIER = re.compile(r"\[Rank (\d+)\]: Ranks? ([\d, ]+) failed to pass monitoredBarrier")
_ROOT_CAUSE_RANK = re.compile(r"^\s*rank\s+: (\d+) \(local_rank: (\d+)\)")
_EXIT_CODE = re.compile(r"^\s*exitcode\s+: (-?\d+) \(pid: (\d+)\)")
_HEARTBEAT = re.compile(r"Heartbeat monitor timed out|watchdog got stuck for (\d+) seconds|'s watchdog got stuck")
_GARBAGE = 1 << 31


def read(line: Line, source: Source) -> Iterator[Observation]:
    text = line.text
    if match := _TIMEOUT.search(text):
        if "terminated with exception" not in text and "failed due to" not in text:
            yield _timed_out(match, line, source)
        return
    if "last enqueued" in text and (group := _PG.search(text)) and (status := _STATUS.search(text)):
        yield _progress(group, status, line, source)
        return
    if match := _DUMP_FROM.search(text):
        yield from _dump_signal(match, line, source)
        return
    if "First PG on this rank to signal dumping" in text:
        yield Note("watchdog", "its own watchdog fired first", line.process, "own", line.at_s, source)
    elif "Observed flight recorder dump signal from another rank" in text:
        yield Note("watchdog", "another rank's watchdog told it to dump", line.process, "other", line.at_s, source)
    elif _HEARTBEAT.search(text):
        yield Note(
            "stuck",
            "the thread of the NCCL watchdog itself is blocked (a CUDA call, or Python's lock)",
            line.process,
            "",
            line.at_s,
            source,
        )
    elif "collectives" in text or "collective:" in text:
        yield from _detail(text, source)
    yield from _gloo(line, source)
    if match := _BARRIER.search(text):
        yield Note(
            "barrier",
            f"monitored_barrier on rank {match[1]} missed ranks {match[2].strip()}",
            line.process,
            match[2].strip(),
            line.at_s,
            source,
        )
    yield from _torchrun(line, source)


def _timed_out(match: re.Match[str], line: Line, source: Source) -> TimedOut:
    work = {name: found[1] if (found := pattern.search(match[2])) else "" for name, pattern in _WORK.items()}
    sizes = tuple((int(work[key]),) for key in ("in", "out") if work[key])
    ran_s = int(match[3]) / 1000
    call = Call(operation(work["op"]), int(work["seq"]) if work["seq"] else None, sizes, source=source)
    since = line.at_s - ran_s if line.at_s is not None else None
    return TimedOut(_global_rank(line), int(match[1]), None, call, ran_s, line.at_s, since, source)


def _global_rank(line: Line) -> int | None:
    return line.process.rank


def _progress(group: re.Match[str], status: re.Match[str], line: Line, source: Source) -> Progress:
    name = group[2] or group[1]
    return Progress(
        _global_rank(line),
        int(group[4]),
        Group(name, group[3] or ""),
        _work(status[1]),
        _work(status[2]),
        line.at_s,
        source,
    )


def _work(number: str) -> int | None:
    """A counter; torch 2.3 prints garbage and later versions -1 where there is none yet."""
    value = int(number)
    return value if 0 <= value < _GARBAGE else None


def _dump_signal(match: re.Match[str], line: Line, source: Source) -> Iterator[Observation]:
    """Printed by process group 0 alone: its counters are of the default group, whichever group hangs."""
    origin = match[1] or "own"
    yield Note(
        "watchdog",
        f"told to dump by {'its own watchdog' if origin == 'own' else 'rank ' + origin}",
        line.process,
        origin,
        line.at_s,
        source,
    )
    status, group = _DUMP_STATUS.search(line.text), _PG.search(line.text)
    if status:
        group_rank = int(group[4]) if group else None
        yield Progress(
            _global_rank(line),
            group_rank,
            Group("0", "default_pg"),
            _work(status[1]),
            _work(status[2]),
            line.at_s,
            source,
        )


def _detail(text: str, source: Source) -> Iterator[Observation]:
    if match := _DETAIL.search(text):
        yield Mismatch(
            int(match[1]),
            _fingerprint(match[2], source),
            int(match[3]),
            _fingerprint(match[4], source),
            match[5].strip(),
            source,
        )
    elif match := _DETAIL_OLD.search(text):
        yield Mismatch(int(match[1]), _fingerprint(match[2], source), None, None, "", source)


def _fingerprint(text: str, source: Source) -> Call:
    number = re.search(r"SequenceNumber=(\d+)", text)
    op = re.search(r"OpType=(\w+?)(?:[,)]|$)", text)
    shape = re.search(r"TensorShape=\[([^\]]*)\]", text)
    dtypes = re.search(r"TensorDtypes=([\w ]+)", text)
    sizes = (tuple(int(n) for n in re.findall(r"\d+", shape[1])),) if shape else ()
    return Call(
        operation(op[1]) if op else "unknown", int(number[1]) if number else None, sizes,
        tuple(dtypes[1].split()) if dtypes else (), source=source,
    )  # fmt: skip


def _gloo(line: Line, source: Source) -> Iterator[Observation]:
    text = line.text
    if match := _GLOO_COUNT.search(text):
        if match[2] != match[3]:
            words = f"rank {match[1]} of a gloo group reached {match[2]} of {match[3]} peers"
            yield Note("incomplete", words, line.process, f"{match[2]}/{match[3]}", line.at_s, source)
        return
    if "Using the loopback address as fallback" in text:
        yield Note(
            "loopback",
            "gloo could not resolve this host's name and bound to loopback",
            line.process,
            "GLOO_SOCKET_IFNAME",
            line.at_s,
            source,
        )
        return
    match = _GLOO.search(text)
    if match is None and "connectFullMesh" not in text:
        return
    words = match[1] if match else text
    address = re.search(r"\[([\da-fA-F.:]+)\]:\d+", words)
    if _GLOO_CONNECT.search(text):
        where = f" ({address[1]})" if address else ""
        yield Failure(
            line.process, "start", f"gloo could not connect its ranks{where}: {_short(words)}", line.at_s, source
        )
    elif _GLOO_PEER.search(words):
        yield Left(line.process, None, f"gloo: {_short(words)}", line.at_s, source)
        yield Failure(line.process, "consequence", f"gloo: {_short(words)}", line.at_s, source)
    elif waited := _GLOO_WAIT.search(words):
        yield Failure(
            line.process, "timeout", f"gloo waited {int(waited[1]) / 1000:g} s for a {waited[2]}", line.at_s, source
        )


def _short(text: str) -> str:
    """The words of an error without the addresses of hosts' ports and without what follows a first sentence."""
    return text.split(". This is typically")[0].rstrip("'\", ")[:160]


def _torchrun(line: Line, source: Source) -> Iterator[Observation]:
    if match := _ROOT_CAUSE_RANK.search(line.text):
        yield Note(
            "torchrun",
            f"torchrun saw rank {match[1]} exit first",
            Process(rank=int(match[1])),
            match[1],
            line.at_s,
            source,
        )
    elif match := _EXIT_CODE.search(line.text):
        code = int(match[1])
        if code == -9:
            yield Failure(Process(int(match[2])), "killed", "torchrun saw it end by SIGKILL", line.at_s, source)
        elif code in (-11, -7):
            yield Failure(
                Process(int(match[2])), "exception", f"torchrun saw it end by signal {-code}", line.at_s, source
            )
