"""A run judged once more from the files it left, which somebody may have damaged since, or made up."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repro.comparison import wrong_tokens
from repro.expectation import document_of, watch_options
from repro.record import myself
from repro.rundir import RunDir, read_json
from repro.settings import RunSettings
from repro.system import System
from repro.verdict import judge
from repro.verdict.facts import Facts
from repro.verdict.result import VERDICTS
from repro.watch import not_decided, uncompared, with_evidence
from repro.witness import read_dir

LOOK_S = 0.5


def judge_again(run_dir: RunDir, settings: RunSettings) -> tuple[dict[str, Any], bool]:
    """The verdict on a run from the files it left, as in verdict.json, and whether all of these could be used to their
    last byte.

    A decided run is judged as of the moment of its verdict.json, from where also comes what the system said then; any
    other, and one whose verdict.json is damaged, as of now, after a look of LOOK_S at its processes.
    """
    witnesses, refused = read_dir(run_dir.root / "events")
    told: dict[str, Any] = {}
    damaged: list[str] = []
    here = myself(0, 1)
    if run_dir.verdict.exists():
        try:
            told, facts = _decided(run_dir.verdict)
        except (OSError, ValueError) as error:
            damaged.append(f"{error}; the run is judged as if it had no verdict.json")
    if told:
        last_ns = (w.last_event_ns() + here.clock_ahead_ns(w.who) for w in witnesses.values() if w.last)
        now_ns = max(last_ns, default=0) + int(told["quiet_s"] * 1e9) + 1_000_000  # the file has milliseconds
    else:
        system = System(LOOK_S)
        system.look(witnesses)
        time.sleep(LOOK_S)
        witnesses, refused = read_dir(run_dir.root / "events")
        facts = system.look(witnesses)
        now_ns = time.monotonic_ns()
    wrong: list[str] = []
    not_compared = ""
    try:
        wrong = wrong_tokens(run_dir, settings.num_ranks, settings.tp_size)
    except FileNotFoundError as error:
        not_compared = str(error)
    except (OSError, ValueError) as error:
        not_compared = "a file with tokens is damaged"
        damaged.append(str(error))
    verdict = judge(
        witnesses,
        facts,
        num_ranks=settings.num_ranks,
        now_ns=now_ns,
        quiet_window_s=settings.quiet_window_s,
        home=here,
        wrong_numbers=wrong,
        queued=watch_options(settings).queued_groups,
    )
    if not_compared and told.get("verdict") not in ("clean", "slow"):  # else who watched has compared them
        verdict = uncompared(verdict, not_compared)
    if verdict.verdict == "clean" and told.get("verdict") == "slow":  # only who watched could see that
        verdict = dataclasses.replace(
            verdict,
            verdict="slow",
            culprits=tuple(told["culprits"]),
            confidence=told["confidence"],
            evidence=tuple(told["evidence"]),
        )
    if told.get("interrupted"):
        verdict = not_decided(verdict)
    used = {witness.who.run_id for witness in witnesses.values()}
    refused += damaged
    whole = not refused and len(used) <= 1 and not any(witness.problems for witness in witnesses.values())
    passed_s = time.time() - run_dir.config.stat().st_mtime
    seconds = {"stall_to_verdict": round(verdict.quiet_s, 3), "total": round(passed_s, 3)}
    return {
        **document_of(settings, with_evidence(verdict, refused)), "system": facts.to_json(),
        "interrupted": bool(told.get("interrupted")), "seconds": told.get("seconds", seconds),
    }, whole  # fmt: skip


_WRITTEN: dict[str, Callable[[Any], bool]] = {
    "verdict": lambda told: told in VERDICTS,
    "confidence": lambda told: isinstance(told, str),
    "culprits": lambda told: isinstance(told, list) and all(isinstance(rank, int) for rank in told),
    "evidence": lambda told: isinstance(told, list) and all(isinstance(text, str) for text in told),
    "quiet_s": lambda told: isinstance(told, (int, float)) and 0 <= told < 1e6,
    "seconds": lambda told: isinstance(told, dict),
}
"""What is taken from a verdict.json, and whether it may stand there."""


def _decided(path: Path) -> tuple[dict[str, Any], Facts]:
    """A verdict.json and what the system said then; raises ValueError with the file and what is wrong with it."""
    told = read_json(path)
    if not isinstance(told, dict):
        raise ValueError(f"{path}:1: not a mapping")
    for name, may_stand_there in _WRITTEN.items():
        if name not in told:
            raise ValueError(f"{path}:1: {name} is missing")
        if not may_stand_there(told[name]):
            raise ValueError(f"{path}:1: {name} is not what a run writes there")
    try:
        return told, Facts.from_json(told["system"])
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"{path}:1: system is not what a run writes there") from None
