"""Draw what some ranks did in a time window: for each rank a row with bars for collectives, locks and builds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from repro.report.gather import RunData, describe
from repro.report.lanes import OPEN, Label, Lane, Span
from repro.report.pictures.svg import NUM_GROUP_COLOURS, Svg, add_tooltip

_LOCAL_CSS = {"lock": "lock", "held": "lock", "build": "build"}
_NARROW_PX = 2.0
"""Bars of one colour that touch and are narrower than this are drawn as one."""


@dataclass(frozen=True)
class Frame:
    """Where the rows of the ranks are in the picture, in pixels.

    row_px   height of a row
    labels   whether to draw the ranks' names and phases
    """

    left: float
    right: float
    top: float
    row_px: float
    labels: bool = True


class Chart:
    """Draws a row for each rank into an Svg: bars for the collectives, locks and builds in a time window.

    merged   whether some narrow bars were drawn as one bar
    """

    def __init__(self, svg: Svg, data: RunData, window_ns: tuple[int, int], frame: Frame, ranks: Sequence[int]) -> None:
        self._svg, self._data, self._frame, self._ranks = svg, data, frame, ranks
        self._start_ns, self._end_ns = window_ns
        self._colours = {name: k % NUM_GROUP_COLOURS for k, name in enumerate(group_names(data))}
        self._bar_px = frame.row_px - (4 if frame.labels else 1)
        self.merged = False

    @property
    def bottom(self) -> float:
        return self._frame.top + self._frame.row_px * len(self._ranks)

    def draw_axis(self) -> None:
        """Draw grid lines at round times since the first event of the run."""
        origin_ns = self._data.span_ns()[0]
        step_ns = _round_step((self._end_ns - self._start_ns) / 8)
        first = -(-(self._start_ns - origin_ns) // step_ns)
        top = self._frame.top
        for k in range(first, first + 12):
            t_ns = origin_ns + k * step_ns
            if t_ns > self._end_ns:
                return
            x = self._x(t_ns)
            self._svg.line("grid", x, top - 6, x, self.bottom)
            self._svg.text("dim small", x, top - 11, name_time(k * step_ns, step_ns), anchor="middle")

    def draw_lanes(self) -> None:
        frame = self._frame
        for row, rank in enumerate(self._ranks):
            y = frame.top + row * frame.row_px
            self._svg.rect("lane", frame.left, y, frame.right - frame.left, self._bar_px)
            if frame.labels:
                self._draw_name(rank, y)
            self._draw_spans(self._data.lanes[rank], y)

    def draw_divergence(self) -> None:
        """Mark the collectives at which ranks first differ.

        If the ranks did more than two different things there, only those that did one of the first two are marked.
        """
        top = self._frame.top
        for k, side in enumerate(self._data.verdict.sides[:2]):
            for rank in side.ranks:
                place = find_call(self._data, rank, side.group, side.seq)
                if rank not in self._ranks or place is None:
                    continue
                x = self._x(self._data.lanes[rank].starts[place])
                y = top + self._ranks.index(rank) * self._frame.row_px
                self._svg.path("mark", f"M{x - 5:.1f},{y - 3:.1f} h10 l-5,8z")
                if k == 0 and rank == side.ranks[0]:
                    line = self._svg.line("mark", x, top - 24, x, self.bottom)
                    line.attrib |= {"stroke-dasharray": "3 3", "opacity": ".6"}
                    self._svg.text("bold small", x - 6, top - 24, "first divergent entry ▸", anchor="end")

    def _x(self, t_ns: int) -> float:
        share = (t_ns - self._start_ns) / max(1, self._end_ns - self._start_ns)
        return self._frame.left + min(max(share, 0.0), 1.0) * (self._frame.right - self._frame.left)

    def _draw_name(self, rank: int, y: float) -> None:
        culprit = rank in self._data.verdict.culprits
        middle = y + self._bar_px / 2
        if culprit:
            self._svg.circle("culprit", 12, middle, 3.5)
        self._svg.text("bold" if culprit else "", 22, middle + 4, f"rank {rank}")

    def _draw_spans(self, lane: Lane, y: float) -> None:
        run: tuple[str, float, float] | None = None  # narrow neighbouring bars that are drawn as one: style, from, to
        for span, label in self._in_sight(lane):
            x1, x2 = self._x(span.start_ns), self._x(self._end_ns if span.end_ns == OPEN else span.end_ns)
            if label.kind == "phase":
                if self._frame.labels:
                    self._svg.rect("phase", x1, y, x2 - x1, 2.5)
                continue
            if span.end_ns == OPEN and label.kind in ("call", "lock") and self._data.stuck:
                self._draw_stall(label, span.seq, x1, x2, y)
                continue
            css = self._css(label)
            if label.kind == "held":
                self._draw_bar(css, x1, x2, y + self._bar_px - 2.5, 2.5)
            elif self._frame.labels and x2 - x1 > _NARROW_PX:
                self._draw_bar(css, x1, x2 - 0.5, y + 3, self._bar_px - 3, f"{describe(label)} #{span.seq}")
            elif run and run[0] == css and x1 - run[2] < 0.6:
                run = css, run[1], max(run[2], x2)
                self.merged = True
            else:
                self._draw_run(run, y)
                run = css, x1, x2
        self._draw_run(run, y)

    def _in_sight(self, lane: Lane) -> Iterator[tuple[Span, Label]]:
        table = self._data.labels.table
        for span in lane.spans():
            label = table[span.label]
            ends_before = span.end_ns != OPEN and span.end_ns < self._start_ns
            if not ends_before and span.start_ns <= self._end_ns and label.kind not in ("step", "failed"):
                yield span, label

    def _css(self, label: Label) -> str:
        return _LOCAL_CSS.get(label.kind) or f"g{self._colours.get(label.group, 0)}"

    def _draw_run(self, run: tuple[str, float, float] | None, y: float) -> None:
        inset = 3 if self._frame.labels else 0
        if run:
            self._draw_bar(*run, y + inset, self._bar_px - inset)

    def _draw_bar(self, css: str, x1: float, x2: float, y: float, height: float, tooltip: str = "") -> None:
        bar = self._svg.rect(css, x1, y, max(0.7, x2 - x1), height)
        if tooltip:
            add_tooltip(bar, tooltip)

    def _draw_stall(self, label: Label, seq: int, x1: float, x2: float, y: float) -> None:
        height = self._bar_px
        box = x1, y + 1, x2 - x1, height - 1
        self._svg.rect(self._css(label), *box, opacity=0.22)
        self._svg.hatched(*box, opacity=0.5)
        if self._frame.labels and height >= 15 and x2 - x1 > 150:
            words = f"waits in {describe(label)} #{seq}" if label.kind == "call" else f"waits for lock {label.name}"
            fits = max(8, int((x2 - x1 - 16) / 6.6))
            words_px = min(x2 - x1 - 10, 6.35 * min(len(words), fits) + 8)
            self._svg.rect("paper", x1 + 5, y + 3, words_px, height - 5, rounded=2, opacity=0.82)
            self._svg.text("onstall small", x1 + 9, y + height / 2 + 4, words, most_characters=fits)


def group_names(data: RunData) -> list[str]:
    """Return the names of all groups. The index of a group in this list decides its colour."""
    return list(dict.fromkeys(label.group for label in data.labels.table if label.group))


def find_call(data: RunData, rank: int, group: str, seq: int) -> int | None:
    """Return the index of a collective among the time spans of `rank`; None if it is not among them.

    seq: the sequence number of the collective in `group`
    """
    lane = data.lanes.get(rank)
    if lane is None:
        return None
    for place in range(len(lane) - 1, -1, -1):
        label = data.labels.table[lane.labels[place]]
        if lane.seqs[place] == seq and label.group == group and label.kind in ("call", "async"):
            return place
    return None


def _round_step(about_ns: float) -> int:
    step = 1
    while step * 10 < about_ns:
        step *= 10
    return next(step * k for k in (1, 2, 5, 10, 20) if step * k >= about_ns or k == 20)


def name_time(t_ns: int, step_ns: int) -> str:
    """Format a time for the axis. The distance between two grid lines, step_ns, decides the unit: s, ms, µs or ns."""
    for unit_ns, unit in ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs")):
        if step_ns >= unit_ns / 10:
            return f"{t_ns / unit_ns:.{0 if step_ns >= unit_ns else 1}f} {unit}"
    return f"{t_ns} ns"
