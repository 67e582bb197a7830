"""Recognise names and text by a list of words (words.txt), and by forms of numbers and punctuation.

Text that consists of listed words, small numbers and punctuation is recognised. All other text is not recognised. This
module does not try to list what is private, because such a list would never be complete.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_FILE = Path(__file__).with_name("words.txt")
KNOWN = tomllib.loads(Path(__file__).with_name("known.toml").read_text())
WORDS = frozenset(word for line in _FILE.read_text().splitlines() if not line.startswith("#") for word in line.split())

NAMES = frozenset(KNOWN["names"]) | frozenset(KNOWN["scenarios"])
PACKAGES = frozenset(KNOWN["packages"])
"""Packages whose files keep the part of their path that begins at the package."""

EXTENSIONS = frozenset(KNOWN["extensions"])

MAX_NAME = 160
_SPECIAL = re.compile(r"<(?:locals|lambda|module|listcomp|dictcomp|setcomp|genexpr|string|stdin|frozen)>")
_CAMEL = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|.")
_COUNT = re.compile(r"\d{1,5}")
_NUMBER = re.compile(r"[+-]?(?:0x0|\d{1,7}(?:\.\d{1,6})?)(?:ns|us|ms|s|min|m|h|%|x|B|[KMGT]i?B|it|it/s|s/it|K|M|G)?")
_VERSION = re.compile(r"v?\d{1,3}\.\d{1,3}\.\d{1,3}(?:\+(?:cuda\d{1,2}\.\d|cu\d{2,3}|cpu))?")
_RANKS = re.compile(r"(?:\d{1,5}(?:-\d{1,5})?)(?:,(?:…|\d{1,5}(?:-\d{1,5})?))*")
_EVENT = re.compile(r"#\d{1,9}")
_RATIO = re.compile(r"\d{1,7}/\d{1,7}")
_OF_RANK = re.compile(r"rank\d{1,6}(?:-\d{1,6})?(?:\.(?:wit|json|txt|log)(?::\d{1,12}){0,2})?")
_LOOPBACK = re.compile(
    r"(?:tcp://)?(?:127\.0\.0\.1|localhost|0\.0\.0\.0|\[?::1\]?|\[(?:::1|127\.0\.0\.1|localhost)\])(?::\d{1,5})?"
)
_TRANSFER = re.compile(r"(.+):(\d{1,6})>(\d{1,6})")
_MARKS = frozenset(KNOWN["marks"])
_LEADING, _TRAILING = "([{<\"'`", ")]}>\"'`.,;:!?…"
# Emoji, their colour modifiers, and terminal escapes. They are ignored when text is recognised.
_DECORATION = re.compile(
    "\x1b\\[[0-9;]*[A-Za-z]|[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f\u200b-\u200f\u2060-\u2064\ufeff\u00ad]"
)


def plain(text: str) -> str:
    """Remove terminal escapes, emoji and invisible characters, which could split a word in two."""
    return _DECORATION.sub("", text)


def is_word(text: str) -> bool:
    """Whether a word is in words.txt, the list of harmless words. Upper and lower case count as equal."""
    return text.lower() in WORDS


def is_name(text: str) -> bool:
    """Whether a dotted name consists of harmless words and numbers: "layers.0.moe", "ScheduleGuard.admit".

    Harmless words are those of words.txt.
    """
    if not text or len(text) > MAX_NAME:
        return False
    before_is_number = True  # a name begins with a word; two consecutive numbers may be an address
    for part in text.split("."):
        is_number = _COUNT.fullmatch(part) is not None
        if (is_number and before_is_number) or (not is_number and not _is_identifier(part)):
            return False
        before_is_number = is_number
    return True


def _is_identifier(text: str) -> bool:
    """Whether a name in snake or camel case consists of harmless words, which are those of words.txt.

    The name can also have single letters ("x_max"), but not more of them than words.
    """
    if text in NAMES or _SPECIAL.fullmatch(text):
        return True
    parts = [part for part in text.split("_") if part]
    letters = sum(len(part) == 1 and part.isascii() and part.isalpha() for part in parts)
    words = sum(len(part) > 1 and (is_word(part) or _is_camel(part)) for part in parts)
    return letters + words == len(parts) and words > 0 and letters <= words


def _is_camel(text: str) -> bool:
    """Whether a mixed-case name splits into words of words.txt, each of at least two letters: "RankGroups"."""
    parts = _CAMEL.findall(text)
    return len(text) >= 2.5 * len(parts) and all(len(part) > 1 and is_word(part) for part in parts)


def is_file(text: str) -> bool:
    """Whether a file name consists of words of words.txt and a known extension: "runner.py"."""
    stem, _, extension = text.rpartition(".")
    return (extension in EXTENSIONS and is_name(stem)) or _OF_RANK.fullmatch(text) is not None


def below_package(path: str) -> str | None:
    """Return the part of a path that begins at a known package, or that is inside Python's own library.

    Return None if the path has no such part, or if a name in this part is not known.
    """
    for mark in ("/site-packages/", "/dist-packages/"):
        if mark in path:
            inside = path.rpartition(mark)[2]
            return inside if inside.split("/")[0].removesuffix(".py") in PACKAGES and _is_path(inside) else None
    library = re.search(r"/lib(?:64)?/python3\.\d{1,2}/(.+)", path)
    if library is not None:
        return library[1] if _is_path(library[1]) else None
    parts = path.split("/")
    first = next((k for k, part in enumerate(parts[:-1]) if part in PACKAGES), None)
    if first is None:
        return None
    inside = "/".join(parts[first:])
    return inside if _is_path(inside) else None


def _is_path(path: str) -> bool:
    *folders, file = path.split("/")
    return is_file(file) and all(is_name(folder) for folder in folders)


def is_token(text: str) -> bool:
    """Whether a token (a piece of text between spaces) is known to be harmless, so that a bundle may show it.

    Harmless are names of known words, numbers, and tokens that are made of these. Punctuation around the token is
    ignored.
    """
    if len(text) > MAX_NAME:
        return False
    if text in _MARKS or set(text) <= set("-=*_.^~#") or _LOOPBACK.fullmatch(text.rstrip(".,;:")):
        return True
    text = text.lstrip(_LEADING).rstrip(_TRAILING)
    return not text or text in _MARKS or _is_core(text)


def _is_core(text: str) -> bool:
    forms = (_NUMBER, _EVENT, _RATIO, _RANKS, _VERSION, _OF_RANK, _LOOPBACK)
    if any(form.fullmatch(text) for form in forms) or is_name(text) or _is_transfer(text):
        return True
    file, *lines = text.split(":")
    if lines and all(_COUNT.fullmatch(line) for line in lines) and (is_file(file) or is_name(file) or _is_path(file)):
        return True
    return _is_joined(text)


def _is_transfer(text: str) -> bool:
    """Whether a token names a point-to-point transfer by its group and its two ranks: "ep:0>1"."""
    match = _TRANSFER.fullmatch(text)
    return match is not None and is_name(match[1])


def _is_joined(text: str) -> bool:
    """Whether a token is made of harmless parts: an option, name=value, a call, a list, a path or joined words."""
    if text.startswith("-"):
        option, equals, value = text.lstrip("-").partition("=")
        return all(map(is_word, option.split("-"))) and (not equals or is_token(value))
    for mark in ("=", ":"):
        name, found, value = text.partition(mark)
        if found and is_name(name.rstrip(")").replace("(", ".")) and value:
            return is_token(value)
    if "(" in text:
        name, _, inside = text.partition("(")
        return is_name(name) and all(is_token(part) for part in inside.rstrip(")").split(",") if part)
    if "," in text:
        return all(part == "" or is_token(part) for part in text.split(","))
    stem, apostrophe, ending = text.rpartition("'")
    if apostrophe:
        return is_word(stem) and ending in ("s", "t", "re", "ve", "ll", "d")
    if "/" in text:
        return _is_path(text) or all(map(is_name, text.split("/")))
    return "-" in text and all(map(is_word, text.split("-")))
