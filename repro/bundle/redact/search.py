"""Search free text for private content. A line in which a search finds something is dropped completely.

This is used only with --with-logs. A dropped line costs little, and a published password costs much. There are four
independent searches:

- for texts that are known to be private on this machine, such as values of environment variables;
- for words that introduce a secret, a person or a machine;
- for forms that no plain sentence has, and for words that nobody can pronounce;
- with the detectors of the package detect-secrets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from repro.bundle.redact.environment import is_value
from repro.bundle.redact.words import is_token, is_word, plain

CONTEXT = {
    "secrets": "pass|pwd|pswd|secret|token|cred|key|private|signing|signature|auth|cookie|session|bearer|basic|digest"
    "|jwt|pin\\b|otp|salt|hash|sha\\d|pgp|rsa|dsa|ssh|certificate|begin |wandb|webhook|license|jdbc|odbc|dsn",
    "people": "user|usr|sudo|uid|gid|account|owner|author|mail|home|login|logname|person|team|by:|from:|git\\b|commit",
    "machines": "host|node|machine|server|domain|cluster|pod\\b|slurm|address|addr\\b|peer|endpoint|interface|iface"
    "|mac\\b|uuid|serial|ipv|\\bip\\b|dns|fqdn|vpn|subnet|gateway|proxy|bucket|remote|origin|registry|repo\\b|branch",
    "commands": "curl|wget|scp|rsync|mysql|psql|redis|mongo|docker|kubectl|argv|command|export |cd ",
}
"""For each kind of private content: words, or beginnings of words, that often stand before such content."""

FORMS = (
    r"[^\x20-\x7e]",  # look-alike letters and control characters
    r"[@\\$&`^~]",  # mail addresses, Windows paths, escapes, variables, HTML, home folders
    r"://|%[0-9A-Fa-f]{2}|\\x[0-9A-Fa-f]{2}",  # URLs and their escapes
    r"(?:^|\s)--?[A-Za-z]",  # options of a command
    r"[=:]=|=>|:=",  # assignments in other notations than name=value
    r"(?<![\w.])\d+(?:[._-]\d+){3}(?![\w.])|(?:[0-9A-Fa-f]{1,4}[:-]){3,}|::",  # addresses
    r"\b[0-9A-Fa-f]{8,}\b|\d{7,}",  # numbers that may be an address or a key
    r"\d{2,6}(?: \d{2,6}){2}",  # a credit card or telephone number
    r"[A-Za-z0-9+/_-]{24,}={0,2}",  # base64
)
"""A line that contains text of one of these forms is dropped."""

_CONTEXT = re.compile("|".join(CONTEXT.values()), re.IGNORECASE)
_FORM = re.compile("|".join(f"(?:{form})" for form in FORMS))
_TOKEN = re.compile(r"[A-Za-z0-9]+(?:[-_./'][A-Za-z0-9]+)*")
_WORD = re.compile(r"[A-Z]?[a-z]{1,14}|[A-Z]{1,10}")
_VOWEL, _CLUSTER = re.compile(r"[aeiouy]", re.IGNORECASE), re.compile(r"[bcdfghjklmnpqrstvwxz]{5}", re.IGNORECASE)
MIN_LITERAL = 4


class Search:
    """Decides whether a line of text can be published.

    literals   texts that are known to be private on this machine: values of variables, names of hosts and users
    """

    def __init__(self, literals: Iterable[str] = ()) -> None:
        wanted = sorted({text for text in literals if len(text) >= MIN_LITERAL}, key=len, reverse=True)
        self._literals = re.compile("|".join(map(re.escape, wanted)), re.IGNORECASE) if wanted else None

    def __call__(self, text: str) -> bool:
        """Whether the searches find nothing in the text that could be private."""
        text = plain(text)
        if self._literals is not None and self._literals.search(text):
            return False
        if _CONTEXT.search(text) or _FORM.search(text):
            return False
        return all(map(_is_plain, _TOKEN.findall(text))) and not _is_detected(text)


def literals_of(environment: Mapping[str, str]) -> set[str]:
    """Return the values of environment variables that could be secret, and the parts of these values.

    The parts are needed because a log can show only a part of a value, such as the password in a URL.
    """
    values = [value for value in environment.values() if not is_value(value)]
    pieces = (piece for value in values for piece in re.split(r"[\s:/@,;=&?'\"]+", value))
    return {text for text in (*values, *pieces) if len(text) >= 6 and not is_token(text)}


def _is_plain(token: str) -> bool:
    """Whether a token is known to be harmless, or looks like words of a natural language."""
    if is_token(token):
        return True
    if re.search(r"[-./']", token):
        return False
    return all(_is_pronounceable(part) for part in token.split("_"))


def _is_pronounceable(word: str) -> bool:
    return is_word(word) or (
        _WORD.fullmatch(word) is not None and _VOWEL.search(word) is not None and _CLUSTER.search(word) is None
    )


@functools.cache
def _detectors() -> list[Any]:
    """Load the detectors of detect-secrets that examine text. Checks over the network are not used.

    Raises ModuleNotFoundError if detect-secrets is not installed.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class

    classes: Mapping[str, Any] = get_mapping_from_secret_type_to_class()
    return [detector() for detector in classes.values()]


def _is_detected(text: str) -> bool:
    quoted = " ".join(f'"{token}"' for token in _TOKEN.findall(text) if len(token) >= 12)
    return any(any(detector.analyze_string(part)) for detector in _detectors() for part in (text, quoted) if part)


def load() -> None:
    """Load the detectors before the work begins. Raises ModuleNotFoundError if detect-secrets is not installed."""
    _detectors()
