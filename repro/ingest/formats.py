"""The tables of all formats that can be read. To add a format, write a reader, and add a row to a table.

A reader is a module in the folder for its kind of evidence: logs/, ras/, recorder/ or stacks/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from repro.ingest import host_look
from repro.ingest.logs import deepep, detail, engine_messages, failures, gloo, kernel_log, launchers, nccl_log, watchdog
from repro.ingest.logs.prefix import Line
from repro.ingest.ras import document as ras_document
from repro.ingest.ras import monitor as ras_monitor
from repro.ingest.ras import text as ras_text
from repro.ingest.recorder import flight_recorder
from repro.ingest.stacks import dumps as stacks
from repro.trace.foreign.records import Observation, Source


@dataclass(frozen=True)
class FileFormat:
    """A format that covers a whole file, such as a Flight Recorder dump: how to recognise it, and how to read it.

    recognises  gets the name and the first bytes of a file; returns whether the file probably has this format
    read        gets the content and the name of a file; returns what the file shows as records (types of
                `repro.trace.foreign.records`), or None if the file has a different format after all. Raises
                ValueError ("file:offset: problem") if the content is damaged
    """

    name: str
    recognises: Callable[[str, bytes], bool]
    read: Callable[[bytes, str], Iterable[Observation] | None]


class LineReader(Protocol):
    """Reads the messages of one program in a log.

    `read` gets the lines of one file in order. It returns what they show as records (`repro.trace.foreign.records`).
    """

    def read(self, line: Line, source: Source) -> Iterable[Observation]: ...

    def finish(self) -> Iterable[Observation]:
        """Return the records that `read` has held back, because a later line could complete them.

        Call this after the last line.
        """
        ...


@dataclass(frozen=True)
class LineFormat:
    """The log messages of one program, and their reader.

    needles   short texts. To save time, the reader gets only lines that contain at least one of these texts
    reader    makes a `LineReader`, which then reads one file
    """

    name: str
    needles: Sequence[str]
    reader: Callable[[], LineReader]


class _EachLine:
    """A `LineReader` for a program whose messages have one line each: it calls the function ``read`` for each line."""

    def __init__(self, read: Callable[[Line, Source], Iterable[Observation]]) -> None:
        self._read = read

    def read(self, line: Line, source: Source) -> Iterable[Observation]:
        return self._read(line, source)

    def finish(self) -> Iterator[Observation]:
        return iter(())


def _recorder_dump(data: bytes, name: str) -> Iterable[Observation] | None:
    try:
        return [flight_recorder.read(data, name)]
    except flight_recorder.NotARecorderDump:
        return None


def _stacks_document(data: bytes, name: str) -> Iterable[Observation] | None:
    content = stacks.as_json(data)
    return stacks.read_json(content, name) if stacks.looks_like_json(content) else None


def _ras_document(data: bytes, name: str) -> Iterable[Observation] | None:
    content = stacks.as_json(data)
    return ras_document.read(content, name) if ras_document.is_answer(content) else None


def _host_look(data: bytes, name: str) -> Iterable[Observation] | None:
    content = stacks.as_json(data)
    return host_look.read_json(content, name) if host_look.looks_like_json(content) else None


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] in (b"{", b"[")


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


FILES = (
    FileFormat("Flight Recorder dump", lambda name, head: flight_recorder.looks_like(head), _recorder_dump),
    FileFormat("py-spy dump --json", lambda name, head: _is_json(head) and b'"frames"' in head, _stacks_document),
    FileFormat("NCCL RAS, JSON", lambda name, head: _is_json(head) and b'"communicators"' in head, _ras_document),
    FileFormat("look of `collect`", lambda name, head: _is_json(head) and b'"hmr-host-look"' in head, _host_look),
    FileFormat(
        "NCCL RAS, text",
        lambda name, head: ras_text.looks_like(_decoded(head)),
        lambda data, name: ras_text.read(_decoded(data).splitlines(), name),
    ),
    FileFormat(
        "NCCL RAS, no answer",
        lambda name, head: ras_text.no_answer(name, _decoded(head)) is not None,
        lambda data, name: filter(None, [ras_text.no_answer(name, _decoded(data))]),
    ),
)
"""Formats that cover a whole file. The first format that fits is used. A text file of no such format is read line by
line, with LINES."""

LINES = (
    LineFormat("watchdog of NCCL and of the backends that copied it", watchdog.NEEDLES, watchdog.Watchdog),
    LineFormat("TORCH_DISTRIBUTED_DEBUG=DETAIL", detail.NEEDLES, lambda: _EachLine(detail.read)),
    LineFormat("gloo", gloo.NEEDLES, lambda: _EachLine(gloo.read)),
    LineFormat("DeepEP", deepep.NEEDLES, lambda: _EachLine(deepep.read)),
    LineFormat("NCCL_DEBUG", nccl_log.NEEDLES, nccl_log.NcclLog),
    LineFormat("kernel log", kernel_log.NEEDLES, lambda: _EachLine(kernel_log.read)),
    LineFormat("torchrun, MPI, Ray", launchers.NEEDLES, launchers.Launchers),
    LineFormat("NCCL RAS, monitor mode", ras_monitor.NEEDLES, lambda: _EachLine(ras_monitor.read)),
    LineFormat("errors that end a process", failures.NEEDLES, lambda: _EachLine(failures.read)),
)
"""The readers of log lines. A line goes to one reader after another, until one of them returns a record for it."""

ENGINES = LineFormat("vLLM, SGLang, TensorRT-LLM, Ray", engine_messages.NEEDLES, engine_messages.Engine)
"""The reader of serving engines. It also gets the lines that a reader in LINES understands, because it finds out which
process wrote a line."""
