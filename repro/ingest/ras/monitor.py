"""Read lines of the monitor mode of NCCL's RAS (NCCL 2.29 and later): a peer has ended or does not answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.trace.foreign.records import Note, Observation, Process, Source

NEEDLES = ("PEER_DEAD", "PEER_UNRESPONSIVE", "PEER_CONNECTED", "PEER_RECOVERED")

_EVENT = re.compile(r"(PEER_\w+): (?:Process (\d{1,12}))?(.{0,120})")


def read(line: Line, source: Source) -> Iterator[Observation]:
    if match := _EVENT.search(line.text):
        pid = int(match[2]) if match[2] else None
        words = f"NCCL's RAS: {match[1]} {match[2] or ''}{match[3]}".strip()
        yield Note("ras", words, Process(pid), match[1].removeprefix("PEER_"), line.at_s, source)
