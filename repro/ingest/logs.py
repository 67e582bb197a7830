"""Read a text file in one pass, whatever its size: the messages in its lines, and the stacks between them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import BinaryIO

from repro.ingest import deepep, detail, engine_messages, failures, gloo, kernel_log, prefix, ras, stacks
from repro.ingest.launchers import NEEDLES as LAUNCHERS
from repro.ingest.launchers import Launchers
from repro.ingest.nccl_log import NEEDLES as NCCL
from repro.ingest.nccl_log import NcclLog
from repro.ingest.processes import process_of
from repro.ingest.watchdog import NEEDLES as WATCHDOG
from repro.ingest.watchdog import Watchdog
from repro.trace.observed import Observation, Source

MAX_LINE = 16_384
KEPT_RECORDS = 20_000
"""So many of a file's first records are kept, and of its last: a hang begins early, and its traces stand late."""

_Read = Callable[[prefix.Line, Source], Iterable[Observation]]


class _Readers:
    """The readers of one file's lines. The first that knows a line reads it alone, but for the engine's."""

    def __init__(self) -> None:
        watchdog, launchers, nccl = Watchdog(), Launchers(), NcclLog()
        self._of_one_line: tuple[tuple[Sequence[str], _Read], ...] = (
            (WATCHDOG, watchdog.read), (detail.NEEDLES, detail.read), (gloo.NEEDLES, gloo.read),
            (deepep.NEEDLES, deepep.read), (NCCL, nccl.read), (kernel_log.NEEDLES, kernel_log.read),
            (LAUNCHERS, launchers.read), (ras.NEEDLES, ras.read_line), (failures.NEEDLES, failures.read),
        )  # fmt: skip
        self._engine = engine_messages.Engine()
        self._finish = (watchdog.finish, launchers.finish, nccl.finish)
        needles = {needle for row, _ in self._of_one_line for needle in row} | set(engine_messages.NEEDLES)
        self.may_know = re.compile("|".join(map(re.escape, sorted(needles)))).search

    def read(self, line: prefix.Line, source: Source) -> Iterator[Observation]:
        for needles, read in self._of_one_line:
            if any(needle in line.text for needle in needles):
                known = list(read(line, source))
                yield from known
                if known:
                    break
        yield from self._engine.read(line, source)

    def finish(self) -> Iterator[Observation]:
        return chain.from_iterable(finish() for finish in self._finish)


def read(file: BinaryIO, name: str) -> Iterator[Observation]:
    """All records of a text file."""
    owner = process_of(file=name)
    readers = _Readers()
    first: list[Observation] = []
    last: deque[Observation] = deque(maxlen=KEPT_RECORDS)

    def keep(records: Iterable[Observation]) -> None:
        for record in records:
            (first if len(first) < KEPT_RECORDS else last).append(record)

    def lines() -> Iterator[tuple[int, str]]:
        number = 0
        while raw := file.readline(MAX_LINE):
            number += raw.endswith(b"\n") or len(raw) < MAX_LINE
            text = raw.decode("utf-8", errors="replace").rstrip("\r\n")
            whole = raw.endswith(b"\n") or len(raw) == MAX_LINE  # a file that was cut may end inside a line
            if whole and readers.may_know(text):
                keep(readers.read(prefix.parse(number, text, owner), Source(name, f"line {number}")))
            yield number, text

    keep(stacks.read(lines(), name))
    yield from first
    yield from last
    yield from readers.finish()
