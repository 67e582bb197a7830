"""Pictures of a run as SVG: lanes of ranks over time, and who waits for whom. They stand alone, in light and dark.

Groups keep their colour in every picture of a run; a stall is hatched in red, so that it shows in print too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from repro.report.gather import Facts, describe
from repro.report.lanes import OPEN, Label, Lane
from repro.store.text import escape, shorten_rank_lists
from repro.verdict.result import Position, Wait, list_ranks

MAX_ROWS = 48
_NS = 'xmlns="http://www.w3.org/2000/svg"'

STYLE = """
text{font:12px ui-sans-serif,system-ui,"Segoe UI",Roboto,sans-serif;fill:#1c2330}
.dim{fill:#5a6475}.small{font-size:10.5px}.bold{font-weight:600}.mono{font-family:ui-monospace,Menlo,Consolas,monospace}
.lane{fill:#f1f3f7}.grid{stroke:#dde2ea}.phase{fill:#c9d0dc}.box{fill:#fff;stroke:#8b96a8}
.g0{fill:#3f74d8}.g1{fill:#12967a}.g2{fill:#9257c9}.g3{fill:#b8790a}.g4{fill:#c24a8d}.g5{fill:#1f8fb5}
.lock{fill:#7a6a52}.build{fill:#d9702a}.hatch{stroke:#cf2f2f}.stall{stroke:#cf2f2f;fill:none}
.n0{stroke:#6d4bc3;fill:#6d4bc3}.n1{stroke:#a05a00;fill:#a05a00}.n2{stroke:#0b7285;fill:#0b7285}.n3{stroke:#9c2f6b;fill:#9c2f6b}
.culprit{fill:#cf2f2f}
.line{fill:none}.paper{fill:#fff}.mark{stroke:#1c2330;fill:#1c2330}.onstall{fill:#8f1414;font-weight:600}
@media (prefers-color-scheme:dark){text{fill:#e6eaf2}.dim{fill:#9aa5b8}.lane{fill:#1d2430}.grid{stroke:#2c3545}
.phase{fill:#3c4658}.box{fill:#1a202b;stroke:#6d788b}.paper{fill:#12161d}.mark{stroke:#e6eaf2;fill:#e6eaf2}
.g0{fill:#6d9bf1}.g1{fill:#36b897}.g2{fill:#b285e6}.g3{fill:#d99e35}.g4{fill:#e07bb3}.g5{fill:#4fb4d6}
.hatch,.stall{stroke:#ff6b6b}.onstall{fill:#ffc9c9}.culprit{fill:#ff7b7b}
.n0{stroke:#b39bf5;fill:#b39bf5}.n1{stroke:#e0a458;fill:#e0a458}.n2{stroke:#4cc3d9;fill:#4cc3d9}
.n3{stroke:#f08fc0;fill:#f08fc0}}
"""
_NUM_GROUP_COLOURS, _NUM_NODE_COLOURS = 6, 4
_RAIL_PX = 46
_LOCAL_CSS = {"lock": "lock", "held": "lock", "build": "build"}
_DEFS = (
    '<pattern id="h" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<line class="hatch" x1="0" y1="0" x2="0" y2="7" stroke-width="2.6" opacity=".75"/></pattern>'
) + "".join(
    f'<marker id="a{k}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5.5" markerHeight="5.5" orient="auto">'
    f'<path class="n{k}" d="M0,0 8,4 0,8z"/></marker>'
    for k in range(_NUM_NODE_COLOURS)
)


def group_names(facts: Facts) -> list[str]:
    """The groups in the order of their colours."""
    return list(dict.fromkeys(label.group for label in facts.labels.table if label.group))


def interesting_ns(facts: Facts) -> tuple[int, int]:
    """The part of the run to look at first: the stall, and before it about as much of what led there."""
    start_ns, end_ns = facts.span_ns()
    if not facts.stuck:
        phases = (span for lane in facts.lanes.values() for span in lane.spans())
        serving = [s.start_ns for s in phases if facts.labels.table[s.label].kind == "step"]
        return min(serving, default=start_ns), end_ns
    quiet_ns = max(int(facts.verdict.quiet_s * 1e9), (end_ns - start_ns) // 200, 1)
    return max(start_ns, end_ns - int(2.4 * quiet_ns)), end_ns


def timeline(facts: Facts, width: int = 1200) -> str:
    """timeline.svg: the lanes around the stall, the divergence, and who waits for whom."""
    rows = choose_ranks(facts, MAX_ROWS)
    window = interesting_ns(facts)
    found = [wait for wait in facts.verdict.waits if wait.ranks]
    left, top, row_px = 92, 64, 24 if len(rows) <= 16 else 14
    gutter = 30 + _RAIL_PX * min(len(found), 6) if found else 16
    chart = _Chart(facts, window, left, width - gutter, top, row_px, rows)
    bottom = top + row_px * len(rows)
    height = bottom + 52 + 17 * len(found[:6])
    parts = [f'<text class="bold" x="14" y="24" style="font-size:15px">{escape(_title(facts), 140)}</text>']
    parts += chart.axis(bottom)
    parts += chart.lanes()
    parts += chart.divergence(bottom)
    parts += _rails(found, rows, width - gutter + 24, top, row_px)
    parts += _legend(facts, 14, bottom + 36, width)
    for k, wait in enumerate(found[:6]):
        colour, y = k % _NUM_NODE_COLOURS, bottom + 56 + 17 * k
        words = shorten_rank_lists(wait.words())
        parts.append(
            f'<circle class="n{colour}" cx="20" cy="{y - 4}" r="5"/><text x="32" y="{y}">{escape(words)}</text>'
        )
    hidden = len(facts.lanes) - len(rows)
    note = f"{len(rows)} of {len(facts.lanes)} ranks; " if hidden else ""
    if chart.hidden:
        note += "spans narrower than a pixel are merged"
    if note:
        parts.append(f'<text class="dim small" x="{width - 14}" y="24" text-anchor="end">{note.rstrip("; ")}</text>')
    return _document("timeline", width, height, parts, _title(facts))


def strip(facts: Facts, width: int = 560) -> str:
    """A small picture of the serving part of a run, for setting runs beside each other."""
    rows = choose_ranks(facts, 16)
    row_px = 9 if len(rows) <= 8 else 6
    chart = _Chart(facts, interesting_ns(facts), 4, width - 4, 4, row_px, rows, labels=False)
    title = f"lanes of {_title(facts)}"
    key = f"strip-{re.sub('[^a-z]', '', facts.verdict.variant)}"
    return _document(key, width, 8 + row_px * max(1, len(rows)), chart.lanes(), title)


def who_waits(facts: Facts) -> str:
    """Boxes of ranks at one place, arrows to the ranks they wait for; "" when nobody waits for anybody."""
    found = [wait for wait in facts.verdict.waits if wait.ranks][:6]
    if not any(wait.awaited for wait in found):
        return ""
    details = {p.rank: p for p in facts.verdict.ranks}
    boxes = [_box_lines(wait.ranks, wait.waits_in, details) for wait in found]
    known = {rank for wait in found for rank in wait.ranks}
    others = sorted({rank for wait in found for rank in wait.awaited} - known)
    if others:
        states = {details[rank].state if rank in details else "unknown" for rank in others}
        boxes.append(
            [shorten_rank_lists(f"rank{'s' * (len(others) > 1)} {list_ranks(others)}"), ", ".join(sorted(states)), ""]
        )
    box_width, box_height, gap, top = 250, 78, 90, 44
    width = len(boxes) * box_width + (len(boxes) - 1) * gap + 4
    parts: list[str] = []
    for k, lines in enumerate(boxes):
        x = 2 + k * (box_width + gap)
        colour = f"n{k % _NUM_NODE_COLOURS}" if k < len(found) else "grid"
        parts.append(f'<rect class="box" x="{x}" y="{top}" width="{box_width}" height="{box_height}" rx="7"/>')
        parts.append(f'<rect class="{colour}" x="{x}" y="{top}" width="6" height="{box_height}" rx="3"/>')
        for row, (line, style) in enumerate(zip(lines, ("bold", "mono", "dim small"), strict=False)):
            parts.append(f'<text class="{style}" x="{x + 18}" y="{top + 24 + 22 * row}">{escape(line, 38)}</text>')
    for k, wait in enumerate(found):
        for target, other in enumerate([*found, None]):
            ranks = set(other.ranks) if other else set(others)
            if target != k and ranks & set(wait.awaited):
                parts += _arc(k, target, box_width, gap, top, box_height)
    return _document("waits", width, top * 2 + box_height, parts, "who waits for whom", paper=False)


def _arc(source: int, target: int, box_width: int, gap: int, top: int, box_height: int) -> list[str]:
    colour = source % _NUM_NODE_COLOURS
    forward = target > source
    nudge = 26 if forward else -26
    x1 = 2 + source * (box_width + gap) + box_width / 2 + nudge
    x2 = 2 + target * (box_width + gap) + box_width / 2 - nudge
    y = top if forward else top + box_height
    bend = -34 if forward else 34
    middle = (x1 + x2) / 2
    return [
        f'<path class="n{colour} line" style="fill:none" stroke-width="2" marker-end="url(#a{colour})" '
        f'd="M{x1:.0f},{y} C{x1:.0f},{y + bend} {x2:.0f},{y + bend} {x2:.0f},{y + (-2 if forward else 2)}"/>',
        f'<text class="small bold" x="{middle:.0f}" y="{y + (-30 if forward else 39)}" text-anchor="middle">'
        "waits for</text>",
    ]


def _box_lines(ranks: Sequence[int], place: str, details: Mapping[int, Position]) -> list[str]:
    position = details.get(ranks[0])
    where = [position.layer] if position else []
    if position and position.step >= 0:
        where.insert(0, f"step {position.step}")
    return [
        shorten_rank_lists(f"rank{'s' * (len(ranks) > 1)} {list_ranks(ranks)}"),
        place,
        " · ".join(w for w in where if w),
    ]


def choose_ranks(facts: Facts, most: int) -> list[int]:
    """All ranks; of too many, some from every place that ranks stand at, culprits and smallest places first."""
    if len(facts.lanes) <= most:
        return list(facts.lanes)
    places: dict[object, list[int]] = {}
    place_of = {p.rank: (p.state, p.group, p.seq) for p in facts.verdict.ranks}
    for rank in facts.lanes:
        places.setdefault(place_of.get(rank), []).append(rank)
    chosen: list[int] = []
    for left, ranks in zip(range(len(places), 0, -1), sorted(places.values(), key=len), strict=True):
        chosen += ranks[: max(1, (most - len(chosen)) // left)]
    return sorted(chosen[:most])


def _title(facts: Facts) -> str:
    verdict = facts.verdict
    cause = f" ({verdict.cause})" if verdict.cause else ""
    outcome = f"{verdict.verdict}{cause}" if verdict.verdict else "no verdict"
    return f"{verdict.scenario} {verdict.variant}: {outcome}, {facts.num_ranks} ranks, {verdict.backend}"


class _Chart:
    """The lanes of some ranks within a window of time."""

    def __init__(
        self,
        facts: Facts,
        window: tuple[int, int],
        left: float,
        right: float,
        top: float,
        row_px: float,
        rows: Sequence[int],
        labels: bool = True,
    ) -> None:
        self.facts, self.rows, self.labels = facts, rows, labels
        self.start_ns, self.end_ns = window
        self.left, self.right, self.top, self.row_px = left, right, top, row_px
        self.colours = {name: k % _NUM_GROUP_COLOURS for k, name in enumerate(group_names(facts))}
        self.hidden = False

    def x(self, t_ns: int) -> float:
        share = (t_ns - self.start_ns) / max(1, self.end_ns - self.start_ns)
        return self.left + min(max(share, 0.0), 1.0) * (self.right - self.left)

    def axis(self, bottom: float) -> Iterator[str]:
        """Grid lines at round times since the first event of the run."""
        origin_ns = self.facts.span_ns()[0]
        step_ns = _round_step((self.end_ns - self.start_ns) / 8)
        first = -(-(self.start_ns - origin_ns) // step_ns)
        for k in range(first, first + 12):
            t_ns = origin_ns + k * step_ns
            if t_ns > self.end_ns:
                return
            x = self.x(t_ns)
            yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top - 6}" y2="{bottom}"/>'
            yield f'<text class="dim small" x="{x:.1f}" y="{self.top - 11}" text-anchor="middle">{name_time(k * step_ns, step_ns)}</text>'

    def lanes(self) -> list[str]:
        parts: list[str] = []
        for row, rank in enumerate(self.rows):
            y = self.top + row * self.row_px
            height = self.row_px - (4 if self.labels else 1)
            parts.append(
                f'<rect class="lane" x="{self.left}" y="{y:.1f}" width="{self.right - self.left:.1f}" height="{height}"/>'
            )
            if self.labels:
                culprit = rank in self.facts.verdict.culprits
                dot = f'<circle class="culprit" cx="12" cy="{y + height / 2:.1f}" r="3.5"/>' if culprit else ""
                parts.append(
                    f'{dot}<text class="{"bold" if culprit else ""}" x="22" y="{y + height / 2 + 4:.1f}">rank {rank}</text>'
                )
            parts += self._spans(self.facts.lanes[rank], y, height)
        return parts

    def _spans(self, lane: Lane, y: float, height: float) -> Iterator[str]:
        table = self.facts.labels.table
        run: tuple[str, float, float] | None = None  # neighbours of one colour that are drawn as one: css, from, to
        for span in lane.spans():
            label = table[span.label]
            never = span.end_ns == OPEN
            end_ns = self.end_ns if never else span.end_ns
            if end_ns < self.start_ns or span.start_ns > self.end_ns or label.kind in ("step", "failed"):
                continue
            x1, x2 = self.x(span.start_ns), self.x(end_ns)
            if label.kind == "phase":
                if self.labels:
                    yield f'<rect class="phase" x="{x1:.1f}" y="{y:.1f}" width="{x2 - x1:.1f}" height="2.5"/>'
                continue
            if never and label.kind in ("call", "lock") and self.facts.stuck:
                yield from self._stall(label, span.seq, x1, x2, y, height)
                continue
            css = _LOCAL_CSS.get(label.kind) or f"g{self.colours.get(label.group, 0)}"
            if label.kind == "held":
                yield _bar(css, x1, x2, y + height - 2.5, 2.5)
            elif self.labels and x2 - x1 > 2:
                yield _bar(css, x1, x2 - 0.5, y + 3, height - 3, f"{describe(label)} #{span.seq}")
            elif run and run[0] == css and x1 - run[2] < 0.6:
                run = css, run[1], max(run[2], x2)
                self.hidden = True
            else:
                if run:
                    yield _bar(run[0], run[1], run[2], *self._inner(y, height))
                run = css, x1, x2
        if run:
            yield _bar(run[0], run[1], run[2], *self._inner(y, height))

    def _inner(self, y: float, height: float) -> tuple[float, float]:
        inset = 3 if self.labels else 0
        return y + inset, height - inset

    def _stall(self, label: Label, seq: int, x1: float, x2: float, y: float, height: float) -> Iterator[str]:
        box = f'x="{x1:.1f}" y="{y + 1:.1f}" width="{x2 - x1:.1f}" height="{height - 1:.1f}"'
        css = f"g{self.colours.get(label.group, 0)}" if label.group else "lock"
        yield f'<rect class="{css}" opacity=".22" {box}/><rect fill="url(#h)" opacity=".5" {box}/>'
        yield f'<rect class="stall" {box}/>'
        if self.labels and height >= 15 and x2 - x1 > 150:
            words = f"waits in {describe(label)} #{seq}" if label.kind == "call" else f"waits for lock {label.name}"
            fits = max(8, int((x2 - x1 - 16) / 6.6))
            yield (
                f'<rect class="paper" opacity=".82" x="{x1 + 5:.1f}" y="{y + 3:.1f}" '
                f'width="{min(x2 - x1 - 10, 6.35 * min(len(words), fits) + 8):.1f}" height="{height - 5:.1f}" rx="2"/>'
                f'<text class="onstall small" x="{x1 + 9:.1f}" y="{y + height / 2 + 4:.1f}">{escape(words, fits)}</text>'
            )

    def divergence(self, bottom: float) -> Iterator[str]:
        """A mark on the first divergent entry of each side."""
        for k, side in enumerate(self.facts.verdict.sides[:2]):
            for rank in side.ranks:
                place = find_call(self.facts, rank, side.group, side.seq)
                if rank not in self.rows or place is None:
                    continue
                x = self.x(self.facts.lanes[rank].starts[place])
                y = self.top + self.rows.index(rank) * self.row_px
                yield f'<path class="mark" d="M{x - 5:.1f},{y - 3:.1f} h10 l-5,8z"/>'
                if k == 0 and rank == side.ranks[0]:
                    yield f'<line class="mark" stroke-dasharray="3 3" opacity=".6" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top - 24}" y2="{bottom}"/>'
                    yield f'<text class="bold small" x="{x - 6:.1f}" y="{self.top - 24}" text-anchor="end">first divergent entry ▸</text>'


def _bar(css: str, x1: float, x2: float, y: float, height: float, title: str = "") -> str:
    title_element = f"<title>{escape(title, 120)}</title>" if title else ""
    return f'<rect class="{css}" x="{x1:.1f}" y="{y:.1f}" width="{max(0.7, x2 - x1):.1f}" height="{height:.1f}">{title_element}</rect>'


def find_call(facts: Facts, rank: int, group: str, seq: int) -> int | None:
    """The place in the rank's lane of number ``seq`` of a group, looking from the end."""
    lane = facts.lanes.get(rank)
    for place in range(len(lane) - 1, -1, -1) if lane is not None else ():
        label = facts.labels.table[lane.labels[place]]  # type: ignore[union-attr]
        if lane.seqs[place] == seq and label.group == group and label.kind in ("call", "async"):  # type: ignore[union-attr]
            return place
    return None


def _rails(found: Sequence[Wait], rows: Sequence[int], x: float, top: float, row_px: float) -> Iterator[str]:
    """A rail per place with a dot on each rank that stands there, and arrows from rail to rail."""
    shown = [(k, wait, [rows.index(r) for r in wait.ranks if r in rows]) for k, wait in enumerate(found[:6])]
    middle: dict[int, float] = {}
    for k, _, places in shown:
        if not places:
            continue
        at, colour = x + _RAIL_PX * k, k % _NUM_NODE_COLOURS
        ys = [top + row_px * (place + 0.42) for place in places]
        middle[k] = sum(ys) / len(ys)
        yield f'<line class="n{colour}" stroke-width="2" x1="{at}" x2="{at}" y1="{min(ys):.1f}" y2="{max(ys):.1f}"/>'
        yield from (f'<circle class="n{colour}" cx="{at}" cy="{y:.1f}" r="4"/>' for y in ys)
    for k, wait, _ in shown:
        for j, other, _ in shown:
            if j == k or not set(wait.awaited) & set(other.ranks) or k not in middle or j not in middle:
                continue
            colour, shift = k % _NUM_NODE_COLOURS, -11 if k < j else 11
            x1, x2 = x + _RAIL_PX * k, x + _RAIL_PX * j
            toward = 5 if x2 > x1 else -5
            yield (
                f'<path class="n{colour} line" style="fill:none" stroke-width="2" marker-end="url(#a{colour})" '
                f'd="M{x1},{middle[k] + shift:.1f} L{x2 - toward},{middle[j] + shift:.1f}"/>'
            )


def _legend(facts: Facts, x: float, y: float, width: int) -> Iterator[str]:
    entries = [(f"g{k % _NUM_GROUP_COLOURS}", f"group {name}") for k, name in enumerate(group_names(facts)[:8])]
    kinds = {label.kind for label in facts.labels.table}
    entries += [("lock", "lock")] * bool(kinds & {"lock", "held"}) + [("build", "build")] * ("build" in kinds)
    entries += [("phase", "life-cycle phase")]
    for css, name in entries:
        yield f'<rect class="{css}" x="{x}" y="{y - 10}" width="12" height="11" rx="2"/>'
        yield f'<text class="small" x="{x + 17}" y="{y}">{escape(name, 30)}</text>'
        x += 34 + 6.2 * min(len(name), 30)
    if facts.stuck:
        box = f'x="{x}" y="{y - 10}" width="12" height="11"'
        yield f'<rect fill="url(#h)" {box}/><rect class="stall" {box}/>'
        yield f'<text class="small" x="{x + 17}" y="{y}">never returns</text>'
    if facts.verdict.culprits:
        x += 105
        yield f'<circle class="culprit" cx="{x}" cy="{y - 4}" r="3.5"/><text class="small" x="{x + 8}" y="{y}">culprit</text>'


def _document(key: str, width: float, height: float, parts: Iterable[str], title: str, paper: bool = True) -> str:
    """A whole SVG. key: tells its patterns and arrow heads from those of other pictures of one page."""
    back = f'<rect class="paper" width="{width}" height="{height}"/>' if paper else ""
    return (
        f'<svg {_NS} viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{STYLE}</style><defs>{_keyed(_DEFS, key)}</defs>'
        f"{back}{_keyed(''.join(parts), key)}</svg>\n"
    )


def _keyed(markup: str, key: str) -> str:
    return markup.replace('id="', f'id="{key}-').replace("(#", f"(#{key}-")


def _round_step(about_ns: float) -> int:
    step = 1
    while step * 10 < about_ns:
        step *= 10
    return next(step * k for k in (1, 2, 5, 10, 20) if step * k >= about_ns or k == 20)


def name_time(t_ns: int, step_ns: int) -> str:
    """A time in the unit in which steps of this length are readable."""
    for unit_ns, unit in ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs")):
        if step_ns >= unit_ns / 10:
            return f"{t_ns / unit_ns:.{0 if step_ns >= unit_ns else 1}f} {unit}"
    return f"{t_ns} ns"
