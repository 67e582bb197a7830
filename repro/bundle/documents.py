"""JSON files of a run with their known fields alone; their strings as the witnesses have them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from repro.bundle.recognise import Recogniser
from repro.bundle.words import KNOWN
from repro.lab.settings import RunSettings

VERDICT = frozenset(KNOWN["fields"]["verdict"])
"""Fields of verdict.json. Its evidence and sentences are made anew, from the redacted witnesses."""

RECORDER = frozenset(KNOWN["fields"]["recorder"])
"""Fields of a dump of the Flight Recorder."""

_REQUEST = re.compile(r"rank\d{1,6}-\d{1,6}")
_LOCATION = re.compile(r"rank\d{1,6}\.wit:\d{1,12} event \d{1,12}")
_NUMBERED = re.compile(r"\d{0,6}")


def verdict(document: Any, recogniser: Recogniser) -> Any:
    """verdict.json without its evidence and sentences."""
    if isinstance(document, dict):
        document = {name: value for name, value in document.items() if name not in ("evidence", "sentences")}
    return _known(document, VERDICT, recogniser)


def recorder(document: Any, recogniser: Recogniser) -> Any:
    """A dump of the Flight Recorder."""
    return _known(document, RECORDER, recogniser)


def config(document: Any, recogniser: Recogniser) -> Any:
    """config.json; its folders are emptied."""
    return _known(document, _fields(RunSettings), recogniser)


def tokens(document: Any, recogniser: Recogniser) -> Any:
    """reference.json, or the tokens that a rank served: lists of numbers by request."""
    if not isinstance(document, dict):
        return {}
    kept = {}
    for request, numbers in document.items():
        name = request if _REQUEST.fullmatch(request) else recogniser.string(request)
        kept[name] = [n for n in numbers if _is_number(n)] if isinstance(numbers, list) else []
    return kept


def _fields(kind: Any) -> frozenset[str]:
    """The names of a configuration's fields and of those in its parts."""
    names: set[str] = set()
    for field in dataclasses.fields(kind):
        names.add(field.name)
        default = field.default if field.default is not dataclasses.MISSING else None
        if default is None and field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            names |= _fields(type(default))
    return frozenset(names)


_OF_KIND: Mapping[str, Callable[[Recogniser, Any], Any]] = {
    "hostname": lambda recogniser, value: recogniser.host(str(value)),
    "boot_id": lambda recogniser, value: recogniser.boot(str(value)),
    "pid_namespace": lambda recogniser, value: recogniser.namespace(value) if _is_number(value) else 0,
    "layer_pattern": lambda recogniser, value: value if re.fullmatch("[GAM]{1,1024}", str(value)) else "",
    **dict.fromkeys(("cache_dir", "thread_id"), lambda recogniser, value: ""),
    "line": lambda recogniser, value: value if _is_number(value) or _LOCATION.fullmatch(str(value)) else "",
    "name": lambda recogniser, value: recogniser.string(str(value)),
    "filename": lambda recogniser, value: recogniser.path(str(value)),
    "waits_in": lambda recogniser, value: _link(str(value), recogniser),
    "planned": lambda recogniser, value: _planned(str(value), recogniser),
    "detail": lambda recogniser, value: _detail(str(value), recogniser),
}
"""Fields whose name says what they hold."""


def _known(value: Any, fields: frozenset[str], recogniser: Recogniser) -> Any:
    """The value with its known fields; what stands under a number is by rank or by group, and stays too."""
    if isinstance(value, list):
        return [_known(item, fields, recogniser) for item in value]
    if isinstance(value, str):
        return recogniser.string(value)
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        if name in _OF_KIND and name in fields:
            kept[name] = _OF_KIND[name](recogniser, item)
        elif name in fields or _NUMBERED.fullmatch(name):
            kept[name] = _known(item, fields, recogniser)
        else:
            recogniser.left_out["fields"] += 1
    return kept


def _link(text: str, recogniser: Recogniser) -> str:
    """Where ranks of a cycle wait: "dp all_reduce #6", or "lock " and its name."""
    if text.startswith("lock "):
        return f"lock {recogniser.string(text.removeprefix('lock '))}"
    group, _, rest = text.partition(" ")
    op, _, number = rest.rpartition(" ")
    number = number if re.fullmatch(r"#\d{1,12}", number) else ""
    return f"{recogniser.string(group)} {recogniser.string(op)} {number}".rstrip()


def _planned(text: str, recogniser: Recogniser) -> str:
    """An entry of a schedule: "ep all_gather_v of layers.0.moe"."""
    match = re.fullmatch(r"(\S+) (\S+)(?: of (\S+))?", text)
    if match is None:
        return recogniser.string(text)
    named = f"{recogniser.string(match[1])} {recogniser.string(match[2])}"
    return f"{named} of {recogniser.string(match[3])}" if match[3] else named


def _detail(text: str, recogniser: Recogniser) -> str:
    """What a rank does, or its error; of the locks that it holds the names."""
    if text.startswith("holds lock "):
        return "holds lock " + ", ".join(map(recogniser.string, text.removeprefix("holds lock ").split(", ")))
    return recogniser.string(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
