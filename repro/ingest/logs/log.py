"""Read a text file of any size in one pass: log messages, and stacks that were printed between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import BinaryIO

from repro.ingest.formats import ENGINES, LINES
from repro.ingest.logs import prefix
from repro.ingest.names.processes import process_of
from repro.ingest.stacks import dumps as stacks
from repro.trace.foreign.records import Observation, Source

BLOCK = 1 << 18
MAX_LINE = 4096
MAX_WRITERS = 4096
KEPT_RECORDS = 20_000
"""How many records are kept from the beginning of a file, and as many from its end.

The beginning shows which rank each process has, and the first sign of a hang. The end shows its result.
"""


class _Readers:
    """The readers for the lines of one file. Each of them knows the messages of one program, such as torchrun.

    A line is given to these readers, one after another, until one of them returns a record for the line. The reader of
    serving engines always gets the line, too.
    """

    def __init__(self) -> None:
        self._of_a_program = [(row.needles, row.reader()) for row in LINES]
        self._engines = ENGINES.reader()
        self.needles = sorted({needle for row in (*LINES, ENGINES) for needle in row.needles})

    def read(self, line: prefix.Line, source: Source) -> Iterator[Observation]:
        for needles, reader in self._of_a_program:
            if any(needle in line.text for needle in needles) and (records := list(reader.read(line, source))):
                yield from records
                break
        yield from self._engines.read(line, source)

    def finish(self) -> Iterator[Observation]:
        return chain.from_iterable(reader.finish() for _, reader in self._of_a_program)


def read(file: BinaryIO, name: str) -> Iterator[Observation]:
    """Return what a text file shows, as records (`repro.trace.foreign.records`).

    name: the file's name, for messages and for the rank that it can contain
    """
    log = _Log(name)
    while block := file.read(BLOCK):
        block += file.readline(MAX_LINE)
        if block.strip(b"\0"):  # skip zeros: a log that is truncated while a process writes to it has a hole
            log.read(block)
    return log.finish()


class _Log:
    """Reads one text file block by block. To save time, the lines of a block without a known message are not parsed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._owner = process_of(file=name)
        self._readers = _Readers()
        self._stacks = stacks.Stacks(name)
        self._marks = [(mark, mark.encode()) for mark in (*self._readers.needles, *stacks.MARKS)]
        self._writers: set[str] = set()
        self._number = 0
        self._first: list[Observation] = []
        self._last: deque[Observation] = deque(maxlen=KEPT_RECORDS)

    def read(self, block: bytes) -> None:
        """Read one block. A block ends at the end of a line or of the file, or inside a line longer than MAX_LINE."""
        present = [mark for mark, data in self._marks if data in block]
        if not present and not self._stacks.open and self._number > 3 and b"pid=" not in block:
            self._number += block.count(b"\n")
            return
        lines = block.decode("utf-8", errors="replace").split("\n")
        whole = block.endswith(b"\n") or len(block) >= BLOCK  # else the file ends inside a line, which is not read
        for text in lines if lines[-1] else lines[:-1]:
            self._number += 1
            cut = text[:MAX_LINE].rstrip("\r")
            known = any(mark in cut for mark in present)
            if (known or self._is_new_writer(cut)) and (whole or text is not lines[-1]):
                source = Source(self._name, f"line {self._number}")
                self._keep(self._readers.read(prefix.parse(self._number, cut, self._owner), source))
            if known or self._stacks.open or self._number <= 3:
                self._keep(self._stacks.read(self._number, cut))
        if lines[-1] and len(block) >= BLOCK:
            self._number -= 1  # the rest of this line comes with the next block

    def finish(self) -> Iterator[Observation]:
        self._keep(self._stacks.finish())
        return chain(self._first, self._last, self._readers.finish())

    def _is_new_writer(self, line: str) -> bool:
        """Whether a line starts with the name of a process, "(Worker_TP1 pid=42) ", that no earlier line has."""
        if line[:1] not in "(\x1b[" or "pid=" not in line[:200]:
            return False
        writer = line[: line.find(")")][:200]
        if writer in self._writers or len(self._writers) >= MAX_WRITERS:
            return False
        self._writers.add(writer)
        return True

    def _keep(self, records: Iterable[Observation]) -> None:
        for record in records:
            (self._first if len(self._first) < KEPT_RECORDS else self._last).append(record)
