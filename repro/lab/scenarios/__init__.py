"""The scenarios: ways to hang, one file each. A file has the faulty policy, the fix, and the expected verdict.

In the docstring of a scenario, "Upstream" gives the reports of the hang that the scenario rebuilds. "The trigger" is
the situation in which the fault causes a hang. The variant `fault` has the trigger and the fault. The variant `fix` has
the trigger and the cure. The variant `control` has no fault, and in most scenarios no trigger.
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
    """The expected verdict on a variant.

    A field that is None is not checked, except ``cause``: None means that the verdict must have no cause.

    step, layer    the position of every culprit; if the verdict names no culprit, the position of every rank
    error          the type of the exception that every living rank raises
    planned        the planned collective at which the culprits left their schedule: "ep all_gather_v of layers.0.moe"
    suspects       the ranks that behave unlike the other ranks, if no culprit can be proven
    or_else        another verdict that is accepted, because the timing of the run decides between the two
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

        The keys `verdict` and `cause` are always there. Any other field that is None has no key.
        """
        optional: dict[str, Any] = {
            "step": self.step, "layer": self.layer, "planned": self.planned, "error": self.error,
            "culprits": _listed(self.culprits), "suspects": _listed(self.suspects),
            "or_else": self.or_else.to_json() if self.or_else else None,
        }  # fmt: skip
        return {"verdict": self.verdict, "cause": self.cause, **{k: v for k, v in optional.items() if v is not None}}

    def words(self) -> str:
        """Return verdict and cause as text: "deadlock, extra", or with an alternative "crash or deadlock, sizes"."""
        choices = [self]
        while (other := choices[-1].or_else) is not None:
            choices.append(other)
        verdicts = " or ".join(expected.verdict for expected in choices)
        return f"{verdicts}, {self.cause}" if self.cause else verdicts


def _listed(ranks: tuple[int, ...] | None) -> list[int] | None:
    return None if ranks is None else list(ranks)


CLEAN = Expected("clean")
REFUSED = Expected("crash", "error", error="ScheduleMismatch")
"""The expected verdict if `checks` is "agree" or "strict": all ranks stop with the same error instead of hanging."""


@dataclass(frozen=True)
class Scenario:
    """A fault and its fix.

    A field that is a function is shown below as "(arguments) -> result".

    summary    one line that says what goes wrong
    source     the upstream issue or change with the hang that the scenario rebuilds
    policies   (settings, rank) -> the policies (objects that decide for the engine) of this rank
    hang       (settings) -> the expected verdict on the fault if `checks` is "observe", computed from the workload
    refused    (settings) -> the expected verdict on the fault if `checks` is "agree" or "strict"
    fixed      (settings) -> the expected verdict on the fix; a crash if a server can end this run only by an error
    server     (settings, rank) -> the server's configuration on this rank; by default the same on all ranks
    requests   (settings, rank) -> the requests that reach this rank
    before     (settings, cache folder of the run) -> None; puts there what an earlier start of the server would leave
    missing    (settings) -> why the scenario cannot run on this machine; "" if it can
    starts     how often the server starts in one run; the cache folder is kept between the starts
    defaults   the settings whose defaults differ in this scenario, in the form of config.json; a user's file overrides
               these defaults
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
    """Return the rank that has the fault, in scenarios with a fault on one rank. The seed decides which rank it is."""
    return random.Random(settings.seed).randrange(settings.num_ranks)


def names() -> list[str]:
    """Return the names of all scenarios, sorted. A scenario has the name of its file, without ".py"."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Scenario:
    """Return the scenario with this name. config1, config2 and tp8 (`repro.lab.configurations`) are scenarios, too.

    Raises ConfigError for an unknown name; the error suggests a similar name, or lists the known names.
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
    """Return the settings of one run of the scenario ``flags["scenario"]``.

    ``document`` overrides the scenario's defaults, and ``flags`` override both.

    flags     the settings that the command sets, by name: {"scenario": …, "variant": …, "num_ranks": 4}
    document  the content of the user's --config file; None if there is none
    where     the path of this file, for error messages

    Raises ConfigError for an unknown scenario, or with the path of a wrong value.
    """
    return RunSettings.from_document(document or {}, flags, where, load(flags["scenario"]).defaults)
