"""Find what a thread does from its frames. The rules are a table, activities.toml beside this file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

_TABLE = Path(__file__).with_name("activities.toml")


@dataclass(frozen=True, slots=True)
class _Row:
    activity: str
    detail: str
    generic: bool
    frames: tuple[re.Pattern[str], ...]


@cache
def _rows() -> tuple[_Row, ...]:
    rows = tomllib.loads(_TABLE.read_text(encoding="utf-8"))["row"]
    return tuple(
        _Row(row["activity"], row["detail"], row.get("generic", False), tuple(map(re.compile, row["frames"])))
        for row in rows
    )


@cache
def _any_row() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{row.frames[0].pattern})" for row in _rows()))


@lru_cache(maxsize=65_536)
def _first_matches(frame: str) -> tuple[tuple[int, re.Match[str]], ...]:
    """Return the table rows whose first pattern matches a frame. Cached, because many ranks share most frames."""
    if not _any_row().search(frame):
        return ()
    found = ((index, row.frames[0].search(frame)) for index, row in enumerate(_rows()))
    return tuple((index, match) for index, match in found if match is not None)


@lru_cache(maxsize=4096)
def activity_of(frames: tuple[str, ...]) -> tuple[str, str]:
    """Return (activity, detail) of a stack, innermost frame first; ("", "") if no row of the table matches."""
    best = _best(frames)
    if best is None:
        return "", ""
    row, names = _rows()[best[0]], best[1]
    return row.activity, row.detail.format(*(names or [""]))


def row_of(frames: tuple[str, ...]) -> int | None:
    """Return the index of the table row that matches a stack; None if no row matches."""
    best = _best(frames)
    return best[0] if best else None


def _best(frames: tuple[str, ...]) -> tuple[int, list[str]] | None:
    """Return the best matching row, and the names that its patterns captured."""
    best: tuple[tuple[bool, int, int, int], list[str]] | None = None
    for place, frame in enumerate(frames):
        for index, match in _first_matches(_without_line(frame)):
            row = _rows()[index]
            order = (row.generic, place, -len(row.frames), index)
            if best is not None and best[0] <= order:
                continue
            further = _match_outwards(row.frames[1:], frames[place + 1 :])
            if further is not None:
                best = order, [name for it in (match, *further) for name in it.groups() if name]
    return (best[0][3], best[1]) if best else None


def _match_outwards(patterns: Sequence[re.Pattern[str]], frames: Sequence[str]) -> list[re.Match[str]] | None:
    """Return, for each pattern in order, the frame further outwards that it matches; None if a pattern matches none."""
    rest = iter(frames)
    matches = []
    for pattern in patterns:
        match = next((match for frame in rest if (match := pattern.search(_without_line(frame)))), None)
        if match is None:
            return None
        matches.append(match)
    return matches


def _without_line(frame: str) -> str:
    """Drop the line number of a frame: "wait (threading.py:359)" -> "wait (threading.py)"."""
    return re.sub(r":\d+\)$", ")", frame)
