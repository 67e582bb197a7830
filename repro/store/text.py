"""Strings that strangers wrote, made safe to look at: names, logs and paths of a run are shown, never interpreted."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Control characters, terminal escapes among them, marks that turn the direction of writing, and what XML cannot hold.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u061c\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)
_JSON_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def escape_control_characters(text: object, limit: int = 400) -> str:
    """The text on which nothing acts: what cannot be seen as a picture or code point, and no more than ``limit``."""
    shown = _HIDDEN.sub(_picture, str(text))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def escape_lines(text: str, limit: int = 4000) -> str:
    """:func:`visible` text, of which each line may be so long."""
    return "\n".join(escape_control_characters(line, limit) for line in text.split("\n"))


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def escape(text: object, limit: int = 400) -> str:
    """:func:`visible` text for an HTML or XML document, in an attribute too."""
    return html.escape(escape_control_characters(text, limit))


def embed(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":")).translate(_JSON_ESCAPES)


def short_site(site: str) -> str:
    """A call site without the part of its path that is the same everywhere."""
    _, installed, inside = site.rpartition("/site-packages/")
    return inside if installed else site.removeprefix(f"{ROOT}/")


_MANY_RANKS = re.compile(r"\b\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?){8,}\b")


def shorten_rank_lists(text: str) -> str:
    """The text with long lists of ranks cut to their first and their number."""

    def cut(match: re.Match[str]) -> str:
        runs = [part.split("-") for part in match.group().split(",")]
        count = sum(int(run[-1]) - int(run[0]) + 1 for run in runs)
        return f"{','.join('-'.join(run) for run in runs[:3])},… ({count})"

    return _MANY_RANKS.sub(cut, text)
