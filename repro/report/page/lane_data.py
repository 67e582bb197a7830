"""Prepare the data for the page's script: names and the wait-for graph as JSON, time spans as columns of numbers.

The time spans of each rank are in an HTML element of their own. So the script unpacks them only when the rank's row in
the timeline becomes visible.
"""

from __future__ import annotations

import base64
import zlib
from array import array
from collections.abc import Iterator
from typing import Any

from repro.report.gather import RunData
from repro.report.lanes import OPEN, Label, Lane
from repro.report.pictures.chart import group_names
from repro.report.pictures.timeline import interesting_ns
from repro.store.text import escape_control_characters as visible
from repro.verdict.result import Position

_NEVER = 0xFFFFFFFF
"""The length of a span that never ended. script/state.js has the same number."""


def script_data(data: RunData) -> dict[str, Any]:
    """Return all data that the page's script needs, apart from the time spans of the ranks, as JSON values.

    Times are whole numbers of units since the first event. The value "unit" is the length of a unit in ns.
    """
    start_ns, end_ns = data.span_ns()
    unit_ns = _unit_ns(data)
    verdict = data.verdict
    return {
        "unit": unit_ns,
        "end": (end_ns - start_ns) // unit_ns,
        "window": [(t_ns - start_ns) // unit_ns for t_ns in interesting_ns(data)],
        "stuck": data.stuck,
        "groups": [visible(name, 60) for name in group_names(data)],
        "labels": [_label(label) for label in data.labels.table],
        "ranks": list(data.lanes),
        "places": {position.rank: visible(_place(position), 160) for position in verdict.ranks},
        "culprits": verdict.culprits,
        "marks": [[rank, visible(side.group, 60), side.seq] for side in verdict.sides for rank in side.ranks],
        "waits": [[wait.ranks, visible(wait.waits_in, 120), wait.awaited] for wait in verdict.waits],
    }


def pack_lanes(data: RunData) -> Iterator[tuple[int, str]]:
    """Yield, for each rank, (rank, its time spans as columns of numbers, deflated and in base64).

    There are five columns of 32-bit integers. Each column has one number for each time span:

    1. the start, minus the start of the previous span
    2. the length; 2**32 - 1 if the span never ended
    3. the index of the span's text in ``script_data(data)["labels"]``
    4. the sequence number of the collective, 0 for other spans
    5. the step + 1; 0 outside a step

    Starts and lengths are in the units of :func:`script_data`.
    """
    start_ns, unit_ns = data.span_ns()[0], _unit_ns(data)
    for lane in data.lanes.values():
        packed = zlib.compress(_columns(lane, start_ns, unit_ns).tobytes(), 6)
        yield lane.rank, base64.b64encode(packed).decode()


def _columns(lane: Lane, start_ns: int, unit_ns: int) -> array[int]:
    starts = [(t_ns - start_ns) // unit_ns for t_ns in lane.starts]
    differences = (after - before for before, after in zip([0, *starts], starts, strict=False))
    lengths = (
        _NEVER if end_ns == OPEN else min((end_ns - begin_ns) // unit_ns, _NEVER - 1)
        for begin_ns, end_ns in zip(lane.starts, lane.ends, strict=True)
    )
    seqs = (seq & _NEVER for seq in lane.seqs)
    steps = (step + 1 & _NEVER for step in lane.steps)
    packed = array("I")
    for column in (differences, lengths, lane.labels, seqs, steps):
        packed.extend(max(0, number) for number in column)
    return packed


def _unit_ns(data: RunData) -> int:
    """Return the unit of time in ns: a microsecond, or longer if the run is too long to count it in 32 bits."""
    start_ns, end_ns = data.span_ns()
    return max(1000, -(-(end_ns - start_ns) // (_NEVER - 1)))


def _label(label: Label) -> list[str]:
    texts = (label.name, label.group, label.layer, label.note, label.site)
    return [label.kind, *(visible(text, 200) for text in texts)]


def _place(position: Position) -> str:
    if position.op:
        return f"{position.state} in {position.group} {position.op} #{position.seq}"
    return f"{position.state} {position.detail}".strip()
