"""Redact the JSON files of a run: keep the known fields, and redact the strings in these fields."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from hybrid_moe_ref.config import EngineConfig, ModelConfig
from repro.bundle.redact.recognise import Recogniser
from repro.bundle.redact.words import KNOWN
from repro.store.description import RUN_FOLDER

VERDICT = frozenset(KNOWN["fields"]["verdict"])
"""Fields of verdict.json that are kept. Evidence and sentences are dropped here; `assemble` adds them after judging."""

RECORDER = frozenset(KNOWN["fields"]["recorder"])
"""Fields of a Flight Recorder dump that are kept."""

CONFIG = frozenset(KNOWN["fields"]["config"]) | {f.name for kind in (ModelConfig, EngineConfig) for f in fields(kind)}
"""Fields of config.json that are kept, among them all settings of a model and an engine. Numbers stay as they are;
texts stay if their words are known."""

RUN = frozenset(KNOWN["fields"]["run"])
"""Fields of run.json that are kept."""

_PROJECTS = frozenset(KNOWN["projects"])
_REFERENCE = re.compile(r"([\w./-]{1,60})#\d{1,7}")
_SEED = re.compile(r"-?\d{1,19}")
_REQUEST = re.compile(r"rank\d{1,6}-\d{1,6}")
_LOCATION = re.compile(r"rank\d{1,6}\.wit:\d{1,12} event \d{1,12}")
_NUMBERED = re.compile(r"\d{0,6}")


def verdict(document: Any, recogniser: Recogniser) -> Any:
    """Redact the content of verdict.json, and drop its fields `evidence` and `sentences`.

    These two fields are written again when the redacted copy of the run is judged.

    recogniser: redacts the strings
    """
    if isinstance(document, dict):
        document = {name: value for name, value in document.items() if name not in ("evidence", "sentences")}
    return _known(document, VERDICT, recogniser)


def recorder(document: Any, recogniser: Recogniser) -> Any:
    """Redact the content of a Flight Recorder dump, its strings by ``recogniser``."""
    return _known(document, RECORDER, recogniser)


def config(document: Any, recogniser: Recogniser) -> Any:
    """Redact the content of config.json, its strings by ``recogniser``. The paths of folders become empty."""
    return _known(document, CONFIG, recogniser)


def description(document: Any, recogniser: Recogniser) -> Any:
    """Redact run.json: drop each command with a word not known to be harmless, and make the field `family` empty.

    `family` is a digest of the run's settings, and some of these settings are left out of the bundle.

    recogniser: redacts the strings
    """
    kept = _known(document, RUN, recogniser)
    if isinstance(kept, dict) and isinstance(commands := kept.get("commands"), list):
        kept["commands"] = [command for command in commands if isinstance(command, dict) and command.get("words")]
    return kept


def tokens(document: Any, recogniser: Recogniser) -> Any:
    """Redact the request ids of a map from request id to token ids. The token ids stay.

    document: the content of reference.json, or of the file with the tokens that a rank served
    recogniser: redacts the request ids
    """
    if not isinstance(document, dict):
        return {}
    kept = {}
    for request, numbers in document.items():
        name = request if _REQUEST.fullmatch(request) else recogniser.string(request)
        kept[name] = [n for n in numbers if _is_number(n)] if isinstance(numbers, list) else []
    return kept


_OF_KIND: Mapping[str, Callable[[Recogniser, Any], Any]] = {
    "hostname": lambda recogniser, value: recogniser.host(str(value)),
    "boot_id": lambda recogniser, value: recogniser.boot(str(value)),
    "pid_namespace": lambda recogniser, value: recogniser.namespace(value) if _is_number(value) else 0,
    "layer_pattern": lambda recogniser, value: value if re.fullmatch("[GAM]{1,1024}", str(value)) else "",
    **dict.fromkeys(("cache_dir", "thread_id", "family"), lambda recogniser, value: ""),
    "mechanism": lambda recogniser, value: recogniser.line(str(value)),
    "purpose": lambda recogniser, value: recogniser.line(str(value)),
    "source": lambda recogniser, value: _references(str(value), recogniser),
    "words": lambda recogniser, value: _command(value, recogniser),
    "notes": lambda recogniser, value: _lines(value, recogniser),
    "line": lambda recogniser, value: value if _is_number(value) or _LOCATION.fullmatch(str(value)) else "",
    "name": lambda recogniser, value: recogniser.string(str(value)),
    "filename": lambda recogniser, value: recogniser.path(str(value)),
    "waits_in": lambda recogniser, value: _link(str(value), recogniser),
    "planned": lambda recogniser, value: _planned(str(value), recogniser),
    "detail": lambda recogniser, value: _detail(str(value), recogniser),
}
"""For fields whose names show what they contain: how to redact their value."""


def _known(value: Any, names: frozenset[str], recogniser: Recogniser) -> Any:
    """Redact a JSON value: keep the fields whose names are in `names`, and redact their strings.

    Fields whose names are numbers also stay, because these names are ranks or groups.
    """
    if isinstance(value, list):
        return [_known(item, names, recogniser) for item in value]
    if isinstance(value, str):
        return recogniser.string(value)
    if not isinstance(value, dict):
        return value
    kept = {}
    for name, item in value.items():
        if name in _OF_KIND and name in names:
            kept[name] = _OF_KIND[name](recogniser, item)
        elif name in names or _NUMBERED.fullmatch(name):
            kept[name] = _known(item, names, recogniser)
        else:
            recogniser.left_out["fields"] += 1
    return kept


def _lines(lines: Any, recogniser: Recogniser) -> list[str]:
    """Redact the lines of a list, and leave out those that are not known to be harmless."""
    return [text for line in lines if (text := recogniser.line(str(line)))] if isinstance(lines, list) else []


def _link(text: str, recogniser: Recogniser) -> str:
    """Redact the name of what ranks wait for: a collective ("dp all_reduce #6"), or "lock " and the lock's name."""
    if text.startswith("lock "):
        return f"lock {recogniser.string(text.removeprefix('lock '))}"
    group, _, rest = text.partition(" ")
    op, _, number = rest.rpartition(" ")
    number = number if re.fullmatch(r"#\d{1,12}", number) else ""
    return f"{recogniser.string(group)} {recogniser.string(op)} {number}".rstrip()


def _planned(text: str, recogniser: Recogniser) -> str:
    """Redact an entry of a schedule: "ep all_gather_v of layers.0.moe"."""
    match = re.fullmatch(r"(\S+) (\S+)(?: of (\S+))?", text)
    if match is None:
        return recogniser.string(text)
    named = f"{recogniser.string(match[1])} {recogniser.string(match[2])}"
    return f"{named} of {recogniser.string(match[3])}" if match[3] else named


def _detail(text: str, recogniser: Recogniser) -> str:
    """Redact the detail of a rank's position: what it does, its error, or the names of the locks that it holds."""
    if text.startswith("holds lock "):
        return "holds lock " + ", ".join(map(recogniser.string, text.removeprefix("holds lock ").split(", ")))
    return recogniser.string(text)


def _references(text: str, recogniser: Recogniser) -> str:
    """Return the text, which lists upstream reports ("generic; vllm#41862"); "" if a word or project is not known."""
    for word in re.split("[,;]? ", text):
        reference = _REFERENCE.fullmatch(word)
        if reference[1] not in _PROJECTS if reference else recogniser.recognised(word) is None:
            recogniser.left_out["text"] += 1
            return ""
    return text


def _command(words: Any, recogniser: Recogniser) -> list[str]:
    """Return the words of a command; [] if one of its words is not known to be harmless.

    The whole command is dropped, because without this word it would do something different.
    """
    before = ""
    for word in map(str, words) if isinstance(words, list) else ():
        known = (
            word in ("-m", RUN_FOLDER, f"{RUN_FOLDER}/config.json")
            or (before == "--seed" and _SEED.fullmatch(word))
            or recogniser.recognised(word) is not None
        )
        if not known:
            recogniser.left_out["text"] += 1
            return []
        before = word
    return list(map(str, words)) if isinstance(words, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
