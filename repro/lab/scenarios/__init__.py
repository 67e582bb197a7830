"""One file per way to hang. A file holds the faulty policy, its cure, and what the verdict must say."""

from __future__ import annotations

import importlib
import pkgutil
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import ConfigError, nearest
from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.scheduler import Request
from hybrid_moe_ref.engine.server_config import ServerConfig
from repro.lab.settings import RunSettings


@dataclass(frozen=True)
class Expected:
    """What the verdict of a variant must be; a None is not checked.

    step, layer    of every culprit, or of every rank where there is no culprit
    error          the type that every rank raises that still lives
    planned        what was due where the culprits left their schedule: "ep all_gather_v of layers.0.moe"
    suspects       the ranks that stand out where nothing is proven
    or_else        what may come instead, where the backend decides by a race
    """

    verdict: str
    cause: str | None = None
    culprits: tuple[int, ...] | None = None
    step: int | None = None
    layer: str | None = None
    error: str | None = None
    planned: str | None = None
    suspects: tuple[int, ...] | None = None
    or_else: Expected | None = None

    def to_json(self) -> dict[str, Any]:
        """verdict and cause always, the rest where it is known."""
        known: dict[str, Any] = {"step": self.step, "layer": self.layer, "planned": self.planned, "error": self.error}
        known |= {"culprits": _listed(self.culprits), "suspects": _listed(self.suspects)}
        known["or_else"] = self.or_else.to_json() if self.or_else else None
        return {"verdict": self.verdict, "cause": self.cause, **{k: v for k, v in known.items() if v is not None}}

    def words(self) -> str:
        """Verdict and cause: "deadlock, extra"; where it may be another one: "crash or deadlock, sizes"."""
        choices = [self]
        while (other := choices[-1].or_else) is not None:
            choices.append(other)
        verdicts = " or ".join(expected.verdict for expected in choices)
        return f"{verdicts}, {self.cause}" if self.cause else verdicts


def _listed(ranks: tuple[int, ...] | None) -> list[int] | None:
    return None if ranks is None else list(ranks)


CLEAN = Expected("clean")
REFUSED = Expected("crash", "error", error="ScheduleMismatch")
"""A fault that the schedule guard refused: every rank stops with the same message instead of hanging."""


@dataclass(frozen=True)
class Scenario:
    """A fault and its cure. The callables must give every rank what follows from the settings and its rank alone.

    summary    one line: what goes wrong
    source     the upstream issue or change it mirrors
    policies   settings, rank -> the engine's policies; hybrid_moe_ref's own for the variant "control"
    hang       settings -> what the verdict must say of the unguarded fault, computed from the workload alone
    refused    settings -> what it must say of the fault under the guard (checks agree or strict), where it shows at all
    fixed      settings -> what it must say of the fix; not clean where no server can save the run, only end it well
    server     settings, rank -> what the engine is started with, where it is not the same on all ranks
    requests   settings, rank -> the requests that reach this rank
    before     settings, the run's cache folder: what had happened on this machine before the server was started
    missing    settings -> why it cannot run on this machine, or ""
    starts     how often the server starts in one run; what it leaves in its caches is there for the next start
    defaults   what the scenario needs to be different from a run's defaults, as in config.json; a user's file wins
    """

    name: str
    summary: str
    source: str
    policies: Callable[[RunSettings, int], Policies]
    hang: Callable[[RunSettings], Expected]
    refused: Callable[[RunSettings], Expected] = lambda settings: REFUSED
    fixed: Callable[[RunSettings], Expected] = lambda settings: CLEAN
    server: Callable[[RunSettings, int], ServerConfig] = lambda settings, rank: settings.server()
    requests: Callable[[RunSettings, int], list[Request]] = lambda settings, rank: settings.requests()[rank]
    before: Callable[[RunSettings, Path], None] = lambda settings, cache: None
    missing: Callable[[RunSettings], str] = lambda settings: ""
    starts: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def expected(self, settings: RunSettings) -> Expected:
        """What the verdict of ``settings.variant`` must say."""
        if settings.variant == "control":
            return CLEAN
        if settings.variant == "fix":
            return self.fixed(settings)
        hang = self.hang(settings)
        if settings.effective_checks == "observe" or hang == CLEAN:  # nothing goes wrong, so nothing is refused
            return hang
        return self.refused(settings)


def struck_rank(settings: RunSettings) -> int:
    """The rank that a fault of one rank strikes; drawn from the seed."""
    return random.Random(settings.seed).randrange(settings.num_ranks)


def names() -> list[str]:
    """All scenarios, by the names of their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Scenario:
    """The scenario, or the report's configuration, of that name; raises ConfigError with the nearest known one."""
    if name not in names():
        from repro.lab.configurations import CONFIGURATIONS  # made of scenarios

        if name in CONFIGURATIONS:
            return CONFIGURATIONS[name]
        hint = nearest(name, [*names(), *CONFIGURATIONS]) or f"; known: {', '.join(names())}"
        raise ConfigError(f"unknown scenario {name!r}{hint}")
    scenario: Scenario = importlib.import_module(f"{__name__}.{name}").SCENARIO
    return scenario


def settings_of(flags: Mapping[str, Any], document: Mapping[str, Any] | None = None, where: str = "") -> RunSettings:
    """One run of the scenario that the flags name: its defaults, under a user's document, under the flags.

    Raises ConfigError with the path of what is wrong, or for an unknown scenario.
    """
    return RunSettings.from_document(document or {}, flags, where, load(flags["scenario"]).defaults)
