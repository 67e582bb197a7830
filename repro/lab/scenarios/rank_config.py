"""One rank was started with a different flag, so its steps contain different collectives than those of all other ranks.

Upstream: vLLM issue 26187, where a flag of the expert load balancer differed between leader and workers, and only some
ranks issued an all-reduce. Here one rank runs without expert parallelism. This rank holds all experts, dispatches
nothing, and goes on to the next step's agreement, while the other ranks wait for it in the dispatch of the first layer.
Every rank follows its own schedule, so the schedules prove no culprit; the rank that differs is a suspect.

The fix: the ranks first compare a digest of their configurations, and refuse to start if two differ. A server cannot
know which configuration is the intended one.
"""

from __future__ import annotations

import dataclasses

from hybrid_moe_ref.engine.policies import Ballot, Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """Return the configuration of a rank.

    The trigger: in fault and fix, one rank is started without --enable-expert-parallel.
    """
    config = settings.server()
    if settings.variant == "control" or rank != struck_rank(settings):
        return config
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, expert_parallel=False))


class OmitDigest(Ballot):
    """The fault: in the start vote, the ranks do not compare the digests of their configurations."""

    def digest(self, shared: str) -> int:
        return 0


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In control and fix, the ranks compare their configurations in the start vote. In the fault, they do not.
    """
    return Policies(ballot=OmitDigest()) if settings.variant == "fault" else Policies()


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step. The schedules show only which rank differs, not which rank is right."""
    return Expected("deadlock", "mismatch", (), suspects=(struck_rank(settings),))


def refused_at_start(settings: RunSettings) -> Expected:
    """Predict the verdict on the fix: a crash, because every rank refuses to start."""
    return Expected("crash", "error", error="PrepareFailed")


SCENARIO = Scenario(
    name="rank_config",
    summary="one rank was started with a different flag, and its steps contain other collectives",
    source="vllm#26187",
    policies=policies,
    hang=hang,
    fixed=refused_at_start,
    server=server,
)
