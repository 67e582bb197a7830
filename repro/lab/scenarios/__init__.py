"""The scenarios, one file for each way to hang. A file has the faulty policy, the fix, and the expected verdict.

"Upstream" in the docstring of a scenario names the reports whose hang the scenario rebuilds.
"""

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
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Request
from repro.lab.settings import RunSettings


@dataclass(frozen=True)
class Expected:
    """The expected verdict of a variant. A field that is None is not checked.

    step, layer    the position of every culprit; if there is no culprit, the position of every rank
    error          the type of the exception that every living rank raises
    planned        the planned collective at which the culprits left their schedule: "ep all_gather_v of layers.0.moe"
    suspects       the ranks that differ from the others, if no culprit can be proven
    or_else        another verdict that is accepted, because a race in the backend decides between the two
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
        """Return the content of the field `expected` of verdict.json.

        It always has the keys verdict and cause, and the other keys only if they are set.
        """
        optional: dict[str, Any] = {
            "step": self.step, "layer": self.layer, "planned": self.planned, "error": self.error,
            "culprits": _listed(self.culprits), "suspects": _listed(self.suspects),
            "or_else": self.or_else.to_json() if self.or_else else None,
        }  # fmt: skip
        return {"verdict": self.verdict, "cause": self.cause, **{k: v for k, v in optional.items() if v is not None}}

    def words(self) -> str:
        """Return verdict and cause: "deadlock, extra"; with alternatives: "crash or deadlock, sizes"."""
        choices = [self]
        while (other := choices[-1].or_else) is not None:
            choices.append(other)
        verdicts = " or ".join(expected.verdict for expected in choices)
        return f"{verdicts}, {self.cause}" if self.cause else verdicts


def _listed(ranks: tuple[int, ...] | None) -> list[int] | None:
    return None if ranks is None else list(ranks)


CLEAN = Expected("clean")
REFUSED = Expected("crash", "error", error="ScheduleMismatch")
"""The verdict on a fault that the schedule guard refuses: every rank stops with the same error instead of hanging."""


@dataclass(frozen=True)
class Scenario:
    """A fault and its fix. Each callable is a pure function: its result depends only on its arguments.

    Callables are described as "arguments -> result".

    summary    one line that says what goes wrong
    source     the upstream issue or change whose hang the scenario rebuilds
    policies   (settings, rank) -> the engine's policies
    hang       (settings) -> the expected verdict on the fault without the guard, computed from the workload
    refused    (settings) -> the expected verdict on the fault with the guard (`checks` is "agree" or "strict")
    fixed      (settings) -> the expected verdict on the fix; a crash if a server can end this run only by an error
    server     (settings, rank) -> the rank's engine configuration; by default the same on all ranks
    requests   (settings, rank) -> the requests that reach this rank
    before     (settings, cache folder of the run) -> nothing; it prepares what an earlier start would have left there
    missing    (settings) -> why the scenario cannot run on this machine; "" if it can
    starts     how often the server starts in one run; the cache folder is kept between the starts
    defaults   the settings in which this scenario differs from the usual defaults, as in config.json; a user's file
               overrides them
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
        """Return the expected verdict on ``settings.variant``."""
        if settings.variant == "control":
            return CLEAN
        if settings.variant == "fix":
            return self.fixed(settings)
        hang = self.hang(settings)
        if settings.effective_checks == "observe" or hang == CLEAN:  # without a fault the guard has nothing to refuse
            return hang
        return self.refused(settings)


def struck_rank(settings: RunSettings) -> int:
    """Return the rank that has the fault, for scenarios in which only one rank has it. The seed decides which one."""
    return random.Random(settings.seed).randrange(settings.num_ranks)


def names() -> list[str]:
    """Return the names of all scenarios, sorted. They are the names of the scenarios' files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Scenario:
    """Return the scenario with this name; config1, config2 and tp8 (`repro.lab.configurations`) are scenarios, too.

    Raises ConfigError, with the nearest name, for an unknown name.
    """
    if name not in names():
        from repro.lab.configurations import CONFIGURATIONS  # imported here, because it imports this module

        if name in CONFIGURATIONS:
            return CONFIGURATIONS[name]
        hint = nearest(name, [*names(), *CONFIGURATIONS]) or f"; known: {', '.join(names())}"
        raise ConfigError(f"unknown scenario {name!r}{hint}")
    scenario: Scenario = importlib.import_module(f"{__name__}.{name}").SCENARIO
    return scenario


def settings_of(flags: Mapping[str, Any], document: Mapping[str, Any] | None = None, where: str = "") -> RunSettings:
    """Return the settings of one run of the scenario that the flags name.

    A user's document overrides the scenario's defaults, and the flags override both. where: the document's file. Raises
    ConfigError with the path of the wrong value, or for an unknown scenario.
    """
    return RunSettings.from_document(document or {}, flags, where, load(flags["scenario"]).defaults)
