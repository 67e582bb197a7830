"""torch.compile runs on one rank alone, in the first step that needs it, and the others wait: slow, and no deadlock.

Mirrors nanochat issue 722, where the first rank alone compiles and the others stand in the next collective. It takes
seconds for a small model and minutes for a large one, prints nothing, and looks like a hang. Nothing is to be
untangled: the rank finishes and all go on - unless the collective's own time limit is shorter than the compilation,
which turns a slow start into a failure (`--group-timeout 3`; with 60 there is none).

The cure: compile before anybody waits in a collective. One rank of the host does, the others wait for its lock, which
names it and has its own deadline, and then take what it kept. No collective's time limit runs meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Compilation, Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from repro.lab.scenarios import CLEAN, Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from hybrid_moe_ref.engine.compilation import Compiler

LIKELY_S = 3.0
"""What a first compilation takes at least: importing the compiler, and C++ on a CPU."""


@dataclasses.dataclass(frozen=True)
class CompileAtFirstUse(Compilation):
    """The fault: one rank is set up to compile, and does so where it meets a part for the first time."""

    rank: int

    def prepare(self, compiler: Compiler) -> None:
        if compiler.place.rank == self.rank:
            compiler.install()


def policies(settings: RunSettings, rank: int) -> Policies:
    """fault: one rank, at first use; control and fix are the engine's own."""
    return Policies(compilation=CompileAtFirstUse(struck_rank(settings))) if settings.variant == "fault" else Policies()


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """control: nothing is compiled; fault and fix: with torch.compile."""
    config = settings.server()
    if settings.variant != "control":
        return config
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, compile=False))


def hang(settings: RunSettings) -> Expected:
    """No hang: the rank that compiles is named. Under a time limit that is shorter, whoever gives up first fails."""
    if 0 < settings.group_timeout_s <= LIKELY_S:
        return Expected("crash", "error")
    may_be_quick = CLEAN if settings.quiet_window_s > 1 else None
    return Expected("slow", None, (struck_rank(settings),), or_else=may_be_quick)


def fixed(settings: RunSettings) -> Expected:
    """The ranks wait for the one that compiles for all: slow if that takes long enough, and never a failure."""
    return Expected("clean", or_else=Expected("slow"))


def missing(settings: RunSettings) -> str:
    """A compiler, on a CPU."""
    compiler = os.environ.get("CXX", "g++")
    if settings.backend == "nccl" or settings.variant == "control" or shutil.which(compiler):
        return ""
    return f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, or name one in CXX"


SCENARIO = Scenario(
    name="compile_skew",
    summary="torch.compile on one rank alone, in the first step, while the others wait: slow, no deadlock",
    source="nanochat#722",
    policies=policies,
    hang=hang,
    refused=hang,
    fixed=fixed,
    server=server,
    missing=missing,
    defaults={"engine": {"compile": True}, "deadline_s": 300.0},
)
