"""Draw timeline.svg and the small timelines on the page: a row for each rank over time, in a light and a dark scheme.

A group has the same colour in every picture of a run. A call that never returns is hatched, to be visible in print too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from repro.report.gather import RunData
from repro.report.pictures.chart import Chart, Frame, group_names
from repro.report.pictures.svg import NUM_GROUP_COLOURS, NUM_PLACE_COLOURS, Svg
from repro.store.text import shorten_rank_lists
from repro.verdict.result import Wait

MAX_ROWS = 48
MAX_WAITS = 6
_RAIL_PX = 46


def timeline(data: RunData, width: int = 1200) -> str:
    """Draw timeline.svg: what ranks did, the collective at which they first differ, and which ranks wait for which.

    The picture shows only the time window of :func:`interesting_ns`. width: in pixels
    """
    ranks = choose_ranks(data, MAX_ROWS)
    waits = [wait for wait in data.verdict.waits if wait.ranks][:MAX_WAITS]
    row_px = 24 if len(ranks) <= 16 else 14
    gutter = 30 + _RAIL_PX * len(waits) if waits else 16
    frame = Frame(left=92, right=width - gutter, top=64, row_px=row_px)
    svg = Svg("timeline", _title(data))
    chart = Chart(svg, data, interesting_ns(data), frame, ranks)
    svg.text("bold title", 14, 24, _title(data), most_characters=140)
    chart.draw_axis()
    chart.draw_lanes()
    chart.draw_divergence()
    _draw_rails(svg, waits, ranks, frame)
    _draw_legend(svg, data, 14, chart.bottom + 36)
    for k, wait in enumerate(waits):
        y = chart.bottom + 56 + 17 * k
        svg.circle(f"n{k % NUM_PLACE_COLOURS}", 20, y - 4, 5)
        svg.text("", 32, y, shorten_rank_lists(wait.words()))
    notes = [f"{len(ranks)} of {len(data.lanes)} ranks"] if len(ranks) < len(data.lanes) else []
    notes += ["spans narrower than a pixel are merged"] if chart.merged else []
    svg.text("dim small", width - 14, 24, "; ".join(notes), anchor="end")
    return svg.markup(width, chart.bottom + 52 + 17 * len(waits))


def strip(data: RunData, width: int = 560) -> str:
    """Draw what the ranks did as a small picture without text, to compare runs side by side. width: in pixels

    It shows the same time window as :func:`timeline`.
    """
    ranks = choose_ranks(data, 16)
    row_px = 9 if len(ranks) <= 8 else 6
    svg = Svg(f"strip-{re.sub('[^a-z]', '', data.verdict.variant)}", f"lanes of {_title(data)}")
    frame = Frame(left=4, right=width - 4, top=4, row_px=row_px, labels=False)
    Chart(svg, data, interesting_ns(data), frame, ranks).draw_lanes()
    return svg.markup(width, 8 + row_px * max(1, len(ranks)))


def interesting_ns(data: RunData) -> tuple[int, int]:
    """Return the (first, last) time of the most interesting time window, in ns of the clock that all ranks share.

    For a hang: the stall, and a slightly longer time before it. For any other run: from the first step to the end.
    """
    start_ns, end_ns = data.span_ns()
    if not data.stuck:
        spans = (span for lane in data.lanes.values() for span in lane.spans())
        steps = (span.start_ns for span in spans if data.labels.table[span.label].kind == "step")
        return min(steps, default=start_ns), end_ns
    quiet_ns = max(int(data.verdict.quiet_s * 1e9), (end_ns - start_ns) // 200, 1)
    return max(start_ns, end_ns - int(2.4 * quiet_ns)), end_ns


def choose_ranks(data: RunData, most: int) -> list[int]:
    """Choose at most ``most`` ranks to draw, some from each set of ranks that are in the same state and collective.

    Ranks are chosen first from small sets, so that a single rank that differs is shown.
    """
    if len(data.lanes) <= most:
        return list(data.lanes)
    places: dict[object, list[int]] = {}
    place_of = {p.rank: (p.state, p.group, p.seq) for p in data.verdict.ranks}
    for rank in data.lanes:
        places.setdefault(place_of.get(rank), []).append(rank)
    chosen: list[int] = []
    for left, ranks in zip(range(len(places), 0, -1), sorted(places.values(), key=len), strict=True):
        chosen += ranks[: max(1, (most - len(chosen)) // left)]
    return sorted(chosen[:most])


def _title(data: RunData) -> str:
    verdict = data.verdict
    cause = f" ({verdict.cause})" if verdict.cause else ""
    outcome = f"{verdict.verdict}{cause}" if verdict.verdict else "no verdict"
    return f"{verdict.scenario} {verdict.variant}: {outcome}, {data.num_ranks} ranks, {verdict.backend}"


def _draw_rails(svg: Svg, waits: Sequence[Wait], ranks: Sequence[int], frame: Frame) -> None:
    """Draw a line for each collective or lock in which ranks wait, a dot on it for each of these ranks, and arrows.

    An arrow leads from one line to another if ranks on the first wait for ranks on the second.
    """
    middles: dict[int, tuple[float, float]] = {}
    for k, wait in enumerate(waits):
        rows = [ranks.index(rank) for rank in wait.ranks if rank in ranks]
        if not rows:
            continue
        x, css = frame.right + 24 + _RAIL_PX * k, f"n{k % NUM_PLACE_COLOURS}"
        ys = [frame.top + frame.row_px * (row + 0.42) for row in rows]
        middles[k] = x, sum(ys) / len(ys)
        svg.line(css, x, min(ys), x, max(ys), width=2)
        for y in ys:
            svg.circle(css, x, y, 4)
    for k, (x1, y1) in middles.items():
        for j, (x2, y2) in middles.items():
            if j != k and set(waits[k].awaited) & set(waits[j].ranks):
                shift, head = (-11, -5) if k < j else (11, 5)
                svg.arrow(k % NUM_PLACE_COLOURS, f"M{x1:.1f},{y1 + shift:.1f} L{x2 + head:.1f},{y2 + shift:.1f}")


def _draw_legend(svg: Svg, data: RunData, x: float, y: float) -> None:
    entries = [(f"g{k % NUM_GROUP_COLOURS}", f"group {name}") for k, name in enumerate(group_names(data)[:8])]
    kinds = {label.kind for label in data.labels.table}
    entries += [("lock", "lock")] * bool(kinds & {"lock", "held"}) + [("build", "build")] * ("build" in kinds)
    entries += [("phase", "life-cycle phase")]
    for css, name in entries:
        svg.rect(css, x, y - 10, 12, 11, rounded=2)
        svg.text("small", x + 17, y, name, most_characters=30)
        x += 34 + 6.2 * min(len(name), 30)
    if data.stuck:
        svg.hatched(x, y - 10, 12, 11)
        svg.text("small", x + 17, y, "never returns")
        x += 105
    if data.verdict.culprits:
        svg.circle("culprit", x, y - 4, 3.5)
        svg.text("small", x + 8, y, "culprit")
