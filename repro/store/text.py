"""Make untrusted strings, such as names, logs and paths of a run, safe to print on a terminal or a page."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Control characters (a terminal escape begins with one), marks that change the direction of text, and characters that
# XML does not allow.
_HIDDEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u061c\u2028-\u202e\u2060-\u2069\ufeff\ufffe\uffff\ud800-\udfff\U000e0000-\U000e007f]"
)


def escape_control_characters(text: object, limit: int = 400) -> str:
    """Replace each control or invisible character by a symbol or by its code point, such as "<U+200B>".

    If the result has more than ``limit`` characters, cut it to this length; the last character is then "…".
    """
    shown = _HIDDEN.sub(_picture, str(text))
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def escape_lines(text: str, limit: int = 4000) -> str:
    """Apply :func:`escape_control_characters` to each line of a text, and cut each line to ``limit`` characters."""
    return "\n".join(escape_control_characters(line, limit) for line in text.split("\n"))


def counted(number: int, noun: str) -> str:
    """Format a number with its noun: ``1 run``, ``2 runs``, ``2 processes``."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


def short_site(site: str) -> str:
    """Shorten a call site: "/…/site-packages/vllm/a.py:7" -> "vllm/a.py:7". Remove the path of this repository, too."""
    _, installed, inside = site.rpartition("/site-packages/")
    return inside if installed else site.removeprefix(f"{ROOT}/")


_MANY_RANKS = re.compile(r"\b\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?){8,}\b")


def shorten_rank_lists(text: str) -> str:
    """Cut each long list of ranks in a text to its first ranks and the total number of ranks: "0,2,4,… (20)"."""

    def cut(match: re.Match[str]) -> str:
        runs = [part.split("-") for part in match.group().split(",")]
        count = sum(int(run[-1]) - int(run[0]) + 1 for run in runs)
        return f"{','.join('-'.join(run) for run in runs[:3])},… ({count})"

    return _MANY_RANKS.sub(cut, text)
