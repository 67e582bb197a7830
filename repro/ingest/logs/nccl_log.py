"""Read logs with NCCL_DEBUG=INFO: which process joined a communicator, what the process launched, and who left.

A log names a communicator by its address in memory, which differs between processes. A line of `ncclCommInitRank` has
the process's rank in the communicator. COLL lines (NCCL_DEBUG_SUBSYS=COLL) say what the process launched. No line says
that an operation is complete.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from repro.ingest.logs.prefix import Line
from repro.ingest.names.operations import operation
from repro.trace.foreign.records import Call, Failure, Group, Launches, Left, Member, Note, Observation, Process, Source

NEEDLES = ("NCCL INFO", "NCCL WARN", "collective mismatch error")
KEPT_CALLS = 512
MAX_COMMUNICATORS = 4096

_FROM = re.compile(r"(?<!\S)(\S{1,100}?):(\d{1,9}):\d{1,9} (?:\[(\d{1,4})\] )?(?:\S{1,80} ){0,4}?NCCL (?:INFO|WARN)")
_INIT = re.compile(
    r"(?:ncclCommInit\w* |ncclCommSplit\w* )?comm (0x[0-9a-f]+) rank (\d{1,12}) n[rR]anks (\d{1,12})(?: cudaDev \d+)?"
    r"(?: nvmlDev \d+)?(?: busId ([0-9a-f]{1,10}))?(?: commId (0x[0-9a-f]+))?.*Init COMPLETE"
)
_COLL = re.compile(
    r"(\w{1,24}): opCount ([0-9a-f]{1,16}) .*?count (\d{1,12}) "
    r"datatype (\d{1,12}) op \d+ root (\d{1,12}) comm (0x[0-9a-f]+)"
)
_LEFT = re.compile(r"\[Service thread\] Connection closed by localRank (\d{1,12})")
_SIZES = re.compile(r"NET/\w+ : .*?collective mismatch error,? local size (\d{1,12}) remote size (\d{1,12})")
_NETWORK = re.compile(
    r"NET/\w+ ?: (?:Got completion (?:from peer .{0,60}?)?with (?:error|status)[^\n]{0,80}|Got async event[^\n]{0,60})"
)
_CUDA = re.compile(r"Cuda failure (?:\d+ )?'([^']{3,80})'")
_TYPES = (
    "int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16",
    "float8e4m3", "float8e5m2",
)  # fmt: skip


@dataclass(slots=True)
class _Communicator:
    """What a log shows about one communicator in one process, up to the current line.

    begun      whether the log shows the start of the communicator
    numbered   whether ``count`` comes from NCCL's own numbers (`opCount`), because the log does not show the start
    count      number of collectives launched so far, without sends and receives; not correct if neither `begun` nor
               `numbered` is true
    calls      the newest operations: collectives, sends and receives
    """

    process: Process
    host: str
    begun: bool
    size: int = 0
    count: int = 0
    numbered: bool = False
    calls: deque[Call] = field(default_factory=lambda: deque(maxlen=KEPT_CALLS))
    source: Source = field(default_factory=lambda: Source(""))


class NcclLog:
    """Reads the NCCL lines of one file. Several processes can write to this file."""

    def __init__(self) -> None:
        self._communicators: dict[tuple[str, int | None, str], _Communicator] = {}
        self._inits: dict[tuple[str, int | None, int], int] = {}

    def read(self, line: Line, source: Source) -> Iterator[Observation]:
        text = line.text
        match = _FROM.search(text[:400])
        host, pid = (match[1], int(match[2])) if match else ("", line.process.pid)
        process = Process(pid, line.process.title, line.process.rank, line.process.role)
        if match := _INIT.search(text):
            yield from self._joined(match, process, host, source)
        elif match := _COLL.search(text):
            self._launched(match, process, host, line, source)
        elif match := _LEFT.search(text):
            yield Left(process, None, f"NCCL: connection closed by local rank {match[1]}", line.at_s, source)
            words = "NCCL's service thread saw that this rank closed its connection"
            yield Note("local rank", words, process, match[1], line.at_s, source)
        elif match := _SIZES.search(text):
            words = f"NCCL received {match[2]} bytes but expected {match[1]}: two ranks paired different collectives"
            yield Note("sizes", words, process, f"{match[1]} {match[2]}", line.at_s, source)
        elif match := _NETWORK.search(text):
            yield Note("network", f"NCCL: {match[0]}", process, "", line.at_s, source)
        elif match := _CUDA.search(text):
            kind = "memory" if "out of memory" in match[1] else "device"
            yield Failure(process, kind, f"NCCL met a CUDA failure: {match[1]}", line.at_s, source, host=host)

    def finish(self) -> Iterator[Observation]:
        """Return a record for each communicator with operations: its number of collectives, and its newest operations.

        The number is None if the log does not show it.
        """
        for (host, _, pointer), row in self._communicators.items():
            if row.calls:
                count = row.count if row.begun or row.numbered else None
                group = Group(pointer)
                yield Launches(row.process, host, pointer, group, count, tuple(row.calls), row.source)
        self._communicators.clear()

    def _joined(self, match: re.Match[str], process: Process, host: str, source: Source) -> Iterator[Observation]:
        pointer, rank, size, bus, name = match[1], int(match[2]), int(match[3]), match[4], match[5]
        # Lines of older NCCL have no communicator id. Assume that the k-th communicator of a size in one process is
        # also the k-th communicator of this size in every other process.
        if not name:
            place = self._inits[host, process.pid, size] = self._inits.get((host, process.pid, size), 0) + 1
            name = f"communicator {place} of {size} ranks"
        if len(self._communicators) < MAX_COMMUNICATORS:
            self._communicators[host, process.pid, pointer] = _Communicator(process, host, True, size, source=source)
        yield Member(process, host, name, pointer, rank, size, _pci(bus) if bus else "", source)
        yield Note("world", f"a communicator of {size} ranks", process, str(size), None, source)

    def _launched(self, match: re.Match[str], process: Process, host: str, line: Line, source: Source) -> None:
        """Read a COLL line (``match``): add its operation to the newest operations of its communicator in ``process``.

        The collectives of a communicator are numbered from 1; sends and receives have no number. If the log does not
        show the start of the communicator, a collective's number is `opCount` + 1 (`opCount` is hexadecimal in the
        line). But since NCCL 2.27, `opCount` is always 0 on a single node; the number is then unknown.
        """
        key = (host, process.pid, match[6])
        row = self._communicators.get(key)
        if row is None:
            if len(self._communicators) >= MAX_COMMUNICATORS:
                return
            row = self._communicators[key] = _Communicator(process, host, False)
        stated, op, count = int(match[2], 16), operation(match[1]), int(match[3])
        if op in ("send", "recv"):
            peer, seq = int(match[5]), None
        else:
            row.numbered = row.numbered or (not row.begun and stated > 0)
            row.count = stated + 1 if row.numbered else row.count + 1
            peer, seq = None, row.count if row.begun or row.numbered else None
        dtype = _TYPES[int(match[4])] if int(match[4]) < len(_TYPES) else match[4]
        row.calls.append(Call(op, seq, ((count,),), (dtype,), peer, at_s=line.at_s, source=source))
        row.source = source


def _pci(bus: str) -> str:
    """Convert the PCI address in NCCL's form, "5d000", to the form in the Linux kernel's log, "0000:5d:00"."""
    number = int(bus, 16)
    return f"{number >> 20:04x}:{number >> 12 & 0xFF:02x}:{number >> 4 & 0xFF:02x}"
