"""Read mismatches that TORCH_DISTRIBUTED_DEBUG=DETAIL detects before a collective, and errors of monitored_barrier."""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.ingest.names.operations import operation
from repro.trace.foreign.records import Call, Mismatch, Note, Observation, Process, Source

NEEDLES = ("Detected mismatch between collectives", "inconsistent collective", "monitoredBarrier")

_BOTH = re.compile(
    r"Detected mismatch between collectives on ranks\. Rank (\d{1,12}) is running collective: "
    r"(.*?), but Rank (\d{1,12}) is running collective: (.*?)"
    r"(?:\.\s?Collectives differ in the following aspects:\s*(.*))?$"
)
_ONE_SIDE = re.compile(r"Rank (\d{1,12}) is running inconsistent collective: (.*)$")
_MISSED = re.compile(r"(?:\[Rank (\d{1,12})\]: )?Ranks? (\d+(?:, \d+)*) failed to pass monitoredBarrier")
_SENT_ON = re.compile(
    r"Rank (\d{1,12}) successfully reached monitoredBarrier, but received errors .*? from rank (\d{1,12})"
)


def read(line: Line, source: Source) -> Iterator[Observation]:
    text = line.text
    if match := _BOTH.search(text):
        one, other = _fingerprint(match[2], source), _fingerprint(match[4], source)
        yield Mismatch(int(match[1]), one, int(match[3]), other, (match[5] or "").strip(), source)
    elif match := _ONE_SIDE.search(text):
        yield Mismatch(int(match[1]), _fingerprint(match[2], source), None, None, "", source)
    elif match := _MISSED.search(text):
        rank = int(match[1]) if match[1] else line.process.rank
        words = f"monitored_barrier on rank {rank if rank is not None else 0} missed ranks {match[2]}"
        yield Note("barrier", words, Process(line.process.pid, rank=rank), match[2], line.at_s, source)
    elif match := _SENT_ON.search(text):
        words = f"rank {match[1]} passed monitored_barrier; the log of rank {match[2]} names the rank that did not come"
        yield Note("barrier", words, Process(line.process.pid, rank=int(match[1])), "", line.at_s, source)


def _fingerprint(text: str, source: Source) -> Call:
    """Parse the text `CollectiveFingerPrint(…)`, in which torch prints a collective's operation, number and shape.

    source: the file and line of the text
    """
    number = re.search(r"SequenceNumber=(\d{1,18})", text)
    op = re.search(r"OpType=(\w+)", text)
    shape = re.search(r"TensorShape=\[([^\]]*)\]", text)
    dtypes = re.search(r"TensorDtypes=([\w ]+)", text)
    sizes = (tuple(int(n) for n in re.findall(r"\d{1,18}", shape[1])),) if shape else ()
    return Call(
        operation(op[1]) if op else "unknown", int(number[1]) if number else None, sizes,
        tuple(dtypes[1].split()) if dtypes else (), source=source,
    )  # fmt: skip
