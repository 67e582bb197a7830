"""One file per way to hang. A file holds the faulty policy, its cure, and what the verdict must say."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hybrid_moe_ref.config import ConfigError, nearest
from hybrid_moe_ref.engine.policies import Policies
from repro.settings import RunSettings


@dataclass(frozen=True)
class Expected:
    """What the verdict of a variant must be; a None is not checked. ``error`` is the type that every rank raises."""

    verdict: str
    cause: str | None = None
    culprits: tuple[int, ...] | None = None
    step: int | None = None
    layer: str | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """verdict and cause always, the rest where it is known."""
        culprits = None if self.culprits is None else list(self.culprits)
        extra = {"culprits": culprits, "step": self.step, "layer": self.layer, "error": self.error}
        known = {key: value for key, value in extra.items() if value is not None}
        return {"verdict": self.verdict, "cause": self.cause, **known}


CLEAN = Expected("clean")
REFUSED = Expected("crash", "error", error="ScheduleMismatch")
"""A fault that the schedule guard refused: every rank stops with the same message instead of hanging."""


@dataclass(frozen=True)
class Scenario:
    """A fault and its cure.

    summary   one line: what goes wrong
    source    the upstream issue or change it mirrors
    policies  variant -> the engine's policies; hybrid_moe_ref's own for "control"
    hang      settings -> what the verdict must say of the unguarded fault, computed from the workload alone
    """

    name: str
    summary: str
    source: str
    policies: Callable[[str], Policies]
    hang: Callable[[RunSettings], Expected]

    def expected(self, settings: RunSettings) -> Expected:
        """What the verdict of ``settings.variant`` must say."""
        if settings.variant != "fault":
            return CLEAN
        return self.hang(settings) if settings.effective_checks == "observe" else REFUSED


def names() -> list[str]:
    """All scenarios, by the names of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Scenario:
    """The scenario of that name; raises ConfigError with the nearest known one."""
    if name not in names():
        hint = nearest(name, names()) or f"; known: {', '.join(names())}"
        raise ConfigError(f"unknown scenario {name!r}{hint}")
    scenario: Scenario = importlib.import_module(f"{__name__}.{name}").SCENARIO
    return scenario
