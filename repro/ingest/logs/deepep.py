"""Read the time-outs that DeepEP's kernels print. A healthy run can print such lines, too, while it shuts down.

The rank in such a line is a number within one NVLink domain. In DeepEP's barrier, thread t waits for rank t. The line
ends with "value = V"; if V is above 0, rank t has not arrived. After the time-out the kernel aborts (trap), so the
ranks that waited report "unspecified launch failure".
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from repro.ingest.logs.prefix import Line
from repro.trace.foreign.records import Note, Observation, Source

NEEDLES = ("DeepEP",)

_BARRIER = re.compile(r"DeepEP timeout check failed: rank = (\d{1,12}), thread = (\d{1,12}), value = (-?\d{1,12})")
_OTHER = re.compile(
    r"DeepEP (?:internode |intranode |low[- ]latency )?(?:dispatch|combine|timeout|\w+ receiver)[^\n]{0,160}"
)


def read(line: Line, source: Source) -> Iterator[Observation]:
    if match := _BARRIER.search(line.text):
        late = int(match[3]) > 0
        words = f"DeepEP: rank {match[1]} of an NVLink domain ran into the time-out of a barrier"
        words += f"; rank {match[2]} had not come" if late else ""
        yield Note("deepep", words, line.process, match[2] if late else "", line.at_s, source)
    elif (match := _OTHER.search(line.text)) and "timeout" in match[0].lower():
        yield Note("deepep", match[0].strip(), line.process, "", line.at_s, source)
