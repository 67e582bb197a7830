"""Find what a thread does from the frames of its stack: for example, it waits in a collective or builds a kernel.

The rules are rows of the table activities.toml beside this file.
"""

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
    """Return (index of the row, match) for each row of activities.toml whose first pattern matches this frame.

    The result is cached, because the stacks of many ranks have the same frames.
    """
    if not _any_row().search(frame):
        return ()
    found = ((index, row.frames[0].search(frame)) for index, row in enumerate(_rows()))
    return tuple((index, match) for index, match in found if match is not None)


@lru_cache(maxsize=4096)
def activity_of(frames: tuple[str, ...]) -> tuple[str, str]:
    """Return (activity, detail) of the thread with this stack, such as ("building", "a Triton kernel").

    Returns ("", "") if no rule in activities.toml matches.

    frames   "function (file:line)", innermost first
    """
    best = _best(frames)
    if best is None:
        return "", ""
    row, names = _rows()[best[0]], best[1]
    return row.activity, row.detail.format(*(names or [""]))


def row_of(frames: tuple[str, ...]) -> int | None:
    """Return the index of the row of activities.toml that matches a stack best; None if no row matches.

    frames: the frames of the stack as "function (file:line)", innermost first
    """
    best = _best(frames)
    return best[0] if best else None


def _best(frames: tuple[str, ...]) -> tuple[int, list[str]] | None:
    """Return the row of activities.toml that matches a stack best; None if no row matches.

    The result is (index of the row, the texts that the groups in its patterns captured). A row has one or more regular
    expressions. It matches if they match frames of the stack in this order, from the innermost frame outwards.

    If several rows match, the first of these rules that tells them apart decides. The best row

    1. is not marked `generic` in activities.toml;
    2. matches, with its first pattern, a frame further inside than the other rows;
    3. has the most patterns;
    4. comes first in activities.toml.

    frames: the frames of the stack as "function (file:line)", innermost first
    """
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
    """Match the patterns in order, from the innermost frame outwards. Each frame can match only one pattern.

    Returns the match of each pattern; None if a pattern matches none of the frames that remain.
    """
    rest = iter(frames)
    matches = []
    for pattern in patterns:
        match = next((match for frame in rest if (match := pattern.search(_without_line(frame)))), None)
        if match is None:
            return None
        matches.append(match)
    return matches


def _without_line(frame: str) -> str:
    """Remove the line number from a frame: "wait (threading.py:359)" -> "wait (threading.py)"."""
    return re.sub(r":\d+\)$", ")", frame)
