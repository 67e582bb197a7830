"""Draw the wait-for graph of the verdict as boxes and arrows."""

from __future__ import annotations

from collections.abc import Sequence

from repro.report.gather import RunData
from repro.report.pictures.svg import NUM_PLACE_COLOURS, Svg
from repro.report.pictures.timeline import MAX_WAITS
from repro.store.text import shorten_rank_lists
from repro.verdict.result import Position, name_ranks

_WIDTH, _HEIGHT, _GAP, _TOP = 250, 78, 90, 44
_MOST_CHARACTERS = {"bold": 34, "mono": 31, "dim small": 40}
"""For each style of a line in a box, the number of characters that fit."""


def draw_waits(data: RunData) -> str:
    """Draw a box for each collective or lock in which ranks wait, and arrows to the ranks that they wait for.

    Return the SVG; "" if there is no arrow.
    """
    waits = [wait for wait in data.verdict.waits if wait.ranks][:MAX_WAITS]
    if not any(wait.awaited for wait in waits):
        return ""
    positions = {position.rank: position for position in data.verdict.ranks}
    waiting = {rank for wait in waits for rank in wait.ranks}
    elsewhere = sorted({rank for wait in waits for rank in wait.awaited} - waiting)
    svg = Svg("waits", "which ranks wait for which")
    for k, wait in enumerate(waits):
        lines = _name(wait.ranks), _fit(wait.waits_in), _where(positions.get(wait.ranks[0]))
        _draw_box(svg, k, f"n{k % NUM_PLACE_COLOURS}", lines)
    if elsewhere:
        states = sorted({positions[rank].state if rank in positions else "unknown" for rank in elsewhere})
        _draw_box(svg, len(waits), "elsewhere", (_name(elsewhere), ", ".join(states), ""))
    boxes = [*(set(wait.ranks) for wait in waits), *([set(elsewhere)] if elsewhere else [])]
    for k, wait in enumerate(waits):
        for j, ranks in enumerate(boxes):
            if j != k and ranks & set(wait.awaited):
                _draw_arrow(svg, k, j)
    return svg.markup(_left(len(boxes)) - _GAP + 2, _TOP * 2 + _HEIGHT, paper=False)


def _left(place: int) -> int:
    return 2 + place * (_WIDTH + _GAP)


def _draw_box(svg: Svg, place: int, css: str, lines: Sequence[str]) -> None:
    x = _left(place)
    svg.rect("box", x, _TOP, _WIDTH, _HEIGHT, rounded=7)
    svg.rect(css, x, _TOP, 6, _HEIGHT, rounded=3)
    for row, (line, style) in enumerate(zip(lines, _MOST_CHARACTERS, strict=True)):
        svg.text(style, x + 18, _TOP + 24 + 22 * row, line, most_characters=_MOST_CHARACTERS[style])


def _draw_arrow(svg: Svg, source: int, target: int) -> None:
    """Draw an arrow between two boxes: above the boxes if it leads to the right, below them if to the left."""
    up = target > source
    nudge, bend, y, gap = (26, -34, _TOP, -2) if up else (-26, 34, _TOP + _HEIGHT, 2)
    x1 = _left(source) + _WIDTH / 2 + nudge
    x2 = _left(target) + _WIDTH / 2 - nudge
    svg.arrow(source % NUM_PLACE_COLOURS, f"M{x1:.0f},{y} C{x1:.0f},{y + bend} {x2:.0f},{y + bend} {x2:.0f},{y + gap}")
    svg.text("small bold", (x1 + x2) / 2, y + (-30 if up else 39), "waits for", anchor="middle")


def _name(ranks: Sequence[int]) -> str:
    return shorten_rank_lists(name_ranks(ranks))


def _fit(place: str) -> str:
    """Shorten the name of a lock to the width of a box. It keeps its end, which identifies the lock."""
    most = _MOST_CHARACTERS["mono"]
    if not place.startswith("lock ") or len(place) <= most:
        return place
    return f"lock …{place[len('lock …') - most :]}"


def _where(position: Position | None) -> str:
    if position is None:
        return ""
    parts = (f"step {position.step}" if position.step >= 0 else "", position.layer)
    return " · ".join(part for part in parts if part)
