"""Only one rank runs torch.compile, in its first step, and the other ranks wait for it: slow, not a deadlock.

Upstream: nanochat issue 722, where only the first rank compiles and the others wait in the next collective. The
compilation takes seconds for a small model and minutes for a large one, prints nothing, and looks like a hang. When the
compilation ends, all ranks go on. But if the collective's timeout is shorter than the compilation, the waiting ranks
fail: here they fail with `--group-timeout 3`, and not with `--group-timeout 60`.

The fix: compile before any rank waits in a collective. One rank of the host compiles under a lock, and the others wait
for this lock and then load the result. The lock names the rank that compiles, and has a deadline. No rank is in a
collective during this time, so no timeout of a collective can expire.
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
    from hybrid_moe_ref.engine.startup.compilation import Compiler

LIKELY_S = 3.0
"""A first compilation takes at least this many seconds, because on a CPU it compiles C++ several times."""


@dataclasses.dataclass(frozen=True)
class CompileAtFirstUse(Compilation):
    """The fault: only one rank compiles. This rank compiles each part of the model when it first uses this part.

    rank   the rank that compiles
    """

    rank: int

    def prepare(self, compiler: Compiler) -> None:
        if compiler.place.rank == self.rank:
            compiler.install()


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In the fault, one rank compiles at first use. Control and fix use the engine's own policies.
    """
    return Policies(compilation=CompileAtFirstUse(struck_rank(settings))) if settings.variant == "fault" else Policies()


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """Return the server's configuration. The control compiles nothing. Fault and fix use torch.compile."""
    config = settings.server()
    if settings.variant != "control":
        return config
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, compile=False))


def hang(settings: RunSettings) -> Expected:
    """Predict the verdict `slow` with the compiling rank as culprit, or a crash if the group timeout is too short.

    If the group timeout is at most 3 s, the waiting ranks give up before the compilation ends. The prediction names no
    culprit of the crash, because any waiting rank can be the first to fail. With a quiet window of more than 1 s, also
    accept `clean`, because the compilation can be shorter than the window.
    """
    if 0 < settings.group_timeout_s <= LIKELY_S:
        return Expected("crash", "error")
    may_be_quick = CLEAN if settings.quiet_window_s > 1 else None
    return Expected("slow", None, (struck_rank(settings),), or_else=may_be_quick)


def fixed(settings: RunSettings) -> Expected:
    """Predict the verdict of the variant `fix`, in which all ranks wait for the one rank that compiles.

    The verdict is `clean`, or `slow` if the compilation takes long. The run never fails.
    """
    return Expected("clean", or_else=Expected("slow"))


def missing(settings: RunSettings) -> str:
    """Return why torch.compile cannot work here (no C++ compiler); "" if it can, or if it is not needed."""
    compiler = os.environ.get("CXX", "g++")
    if settings.backend == "nccl" or settings.variant == "control" or shutil.which(compiler):
        return ""
    return f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler}: install one, or name one in CXX"


SCENARIO = Scenario(
    name="compile_skew",
    summary="torch.compile runs on one rank only, in the first step, while the others wait: slow, not a deadlock",
    source="nanochat#722",
    policies=policies,
    hang=hang,
    refused=hang,
    fixed=fixed,
    server=server,
    missing=missing,
    defaults={"engine": {"compile": True}, "deadline_s": 300.0},
)
