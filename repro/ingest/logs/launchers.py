"""Read what launchers (torchrun, MPI, Ray) print when a job ends. A launcher reports the first exit that it saw.

After a hang, the first process that ends is ended by a watchdog, so the first exit is not the cause of the hang. But
the end of a process by SIGKILL can be the cause, because no watchdog sends this signal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.trace.foreign.records import Failure, Note, Observation, Process, Source

NEEDLES = ("local_rank:", "exitcode", "MPI_ABORT", "MPI_Abort", "SYSTEM_ERROR", "exit code", "repeated ")

_RANK = re.compile(r"^\s*rank\s+: (\d{1,12}) \(local_rank: (\d{1,12})\)")
_EXIT = re.compile(r"^\s*exitcode\s+: (-?\d{1,12}) \(pid: (\d{1,12})\)")
_AGENT = re.compile(r"failed \(exitcode: (-?\d{1,12})\) local_rank: (\d{1,12}) \(pid: (\d{1,12})\)")
_MPI = re.compile(
    r"MPI_(?:ABORT was invoked|Abort\(?.*?called) on rank (\d{1,12})|MPI_Abort\((\d{1,12})\)", re.IGNORECASE
)
_RAY = re.compile(r"Worker PID: (\d{1,12}) Worker exit type: SYSTEM_ERROR")
_REPEATED = re.compile(r"\[repeated (\d{1,12})x across cluster\]")


class Launchers:
    """Reads the messages of launchers. torchrun prints a process's rank on one line, and its pid on a later line."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._first = True

    def read(self, line: Line, source: Source) -> Iterator[Observation]:
        text = line.text
        if match := _RANK.search(text):
            self._rank = int(match[1])
            if self._first:
                words = f"torchrun saw rank {match[1]} exit first"
                yield Note("torchrun", words, Process(rank=self._rank), match[1], line.at_s, source)
            self._first = False
        elif match := _EXIT.search(text):
            process = Process(int(match[2]), rank=self._rank)
            self._rank = None
            yield Note("process", f"{process} was process {process.pid}", process, "", line.at_s, source)
            yield from _ended(process, int(match[1]), line, source)
        elif match := _AGENT.search(text):
            yield from _ended(Process(int(match[3])), int(match[1]), line, source)
        elif match := _RAY.search(text):
            words = "Ray saw the connection of a worker end, for one of three reasons that its message names"
            yield Failure(Process(int(match[1])), "ended", words, line.at_s, source)
        elif match := _MPI.search(text):
            rank = f" on rank {match[1]}" if match[1] else ""
            yield Failure(line.process, "consequence", f"MPI_Abort was called{rank}", line.at_s, source)
        elif match := _REPEATED.search(text):
            yield Note(
                "repeated", f"Ray left out {match[1]} lines like this one", line.process, match[1], line.at_s, source
            )

    def finish(self) -> Iterator[Observation]:
        return iter(())


def _ended(process: Process, code: int, line: Line, source: Source) -> Iterator[Observation]:
    if code == -9:
        yield Failure(process, "killed", "torchrun saw the process end by SIGKILL", line.at_s, source)
    elif code in (-11, -7, -4):
        yield Failure(process, "exception", f"torchrun saw the process end by signal {-code}", line.at_s, source)
