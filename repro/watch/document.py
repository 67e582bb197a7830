"""verdict.json: what every writer puts into it, and what a second judgement reads from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from repro.store.run_dir import read_json
from repro.verdict import Verdict
from repro.verdict.facts import Facts
from repro.verdict.result import VERDICTS
from repro.watch.look import Look, watcher_from_json

SCHEMA_VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Decided:
    """The entries of a verdict.json that a second judgement uses.

    look       the watcher's last snapshot, without witnesses. None for a file of an older version, which does not name
               the clock of its times
    """

    verdict: Verdict
    facts: Facts
    look: Look | None
    interrupted: bool
    ended_by: str
    seconds: Mapping[str, Any]


def describe(verdict: Verdict) -> dict[str, Any]:
    """The entries of verdict.json that follow from the verdict alone."""
    return {"schema_version": SCHEMA_VERSION, **verdict.to_json(), "sentences": verdict.sentences()}


def read_decided(path: Path) -> Decided:
    """Read a verdict.json; raises ValueError with the file and what is wrong with it."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise ValueError(f"{path}:1: not a mapping")

    def entry(name: str, convert: Callable[[Any], T]) -> T:
        if name not in document:
            raise ValueError(f"{path}:1: {name} is missing")
        try:
            return convert(document[name])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{path}:1: {name} is not what a run writes there") from None

    verdict = Verdict(
        entry("verdict", _verdict),
        confidence=entry("confidence", _text),
        culprits=entry("culprits", lambda ranks: tuple(_instance(rank, int) for rank in _instance(ranks, list))),
        evidence=entry("evidence", lambda lines: tuple(map(_text, _instance(lines, list)))),
        quiet_s=entry("quiet_s", _seconds),
    )
    seconds = entry("seconds", lambda value: _instance(value, dict))
    facts = entry("system", Facts.from_json)
    look = None
    if "watcher" in document:
        watcher, now_ns = entry("watcher", watcher_from_json)
        look = Look(watcher, now_ns, facts=facts)
    ended_by = entry("ended_by", _text) if "ended_by" in document else ""
    return Decided(verdict, facts, look, bool(document.get("interrupted")), ended_by, seconds)


def _instance(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _text(value: Any) -> str:
    return _instance(value, str)


def _verdict(value: Any) -> str:
    if value not in VERDICTS:
        raise ValueError
    return _text(value)


def _seconds(value: Any) -> float:
    if isinstance(value, str) or not 0 <= float(value) < 1e6:
        raise ValueError
    return float(value)
