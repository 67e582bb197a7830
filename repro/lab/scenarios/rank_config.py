"""One rank was started with another flag, so that its steps hold other collectives than those of its peers.

Mirrors vLLM issue 26187, where a flag of the expert load balancer differed between leader and workers, and only some
of them issued an all-reduce. Here one rank lacks expert parallelism: it holds all experts, has nothing to dispatch,
and runs ahead to the next step's agreement, while the others wait for it in the dispatch of the first layer. Every
rank keeps to its own schedule, so the schedules prove nothing against any of them; the odd one is a suspect.

The cure: before anything else the ranks compare a digest of their configurations, and refuse to start when two
differ. A server cannot know which of them is meant.
"""

from __future__ import annotations

import dataclasses

from hybrid_moe_ref.engine.policies import Ballot, Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """The trigger: one rank was started without --enable-expert-parallel."""
    config = settings.server()
    if settings.variant == "control" or rank != struck_rank(settings):
        return config
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, expert_parallel=False))


class SayNothing(Ballot):
    """The fault: the vote asks whether a rank could prepare, and not for which configuration."""

    def digest(self, config: ServerConfig) -> int:
        return 0


def policies(settings: RunSettings, rank: int) -> Policies:
    """fault: configurations are not compared; control and fix: they are."""
    return Policies(ballot=SayNothing()) if settings.variant == "fault" else Policies()


def hang(settings: RunSettings) -> Expected:
    """In the first step of all. The schedules do not show which rank is right, only which one is alone."""
    return Expected("deadlock", "mismatch", (), suspects=(struck_rank(settings),))


def refused_at_start(settings: RunSettings) -> Expected:
    """Nobody starts."""
    return Expected("crash", "error", error="PrepareFailed")


SCENARIO = Scenario(
    name="rank_config",
    summary="one rank was started with another flag, and its steps hold other collectives",
    source="vllm#26187",
    policies=policies,
    hang=hang,
    fixed=refused_at_start,
    server=server,
)
