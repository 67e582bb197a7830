"""Each rank decides for itself whether to replay a graph, and of which size, instead of taking the ranks' lowest mode.

Mirrors vLLM pull request 25906 (a dummy run picked the graph of its own, unpadded number of tokens) and vllm-ascend
pull request 13827 (the ranks' modes were not synchronised, which hung once some ranks were idle while others still
ran). A graph's collectives have the size that it was captured with: a rank that replays one states the sizes of its
graph, a rank that runs eagerly the sizes that were agreed. The first step whose ranks do not all need the same graph
parts them in the dispatch of its first layer.

What follows depends on the backend. gloo ends a rank that is sent more than it has room for, and its peers fail with
it. NCCL gathers equal sizes in another way than unequal ones, so there it is a hang; not run on two GPUs yet.

The cure is a vote: mode is the MIN over all ranks, the size their MAX, and every rank runs what came of it.
"""

from __future__ import annotations

import dataclasses

from hybrid_moe_ref.engine.plan import EAGER, GRAPH, AgreedStep, StepPlan
from hybrid_moe_ref.engine.policies import GraphChoice, Policies
from hybrid_moe_ref.engine.scheduler import step_rows
from hybrid_moe_ref.engine.server_config import ServerConfig
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings


class OwnGraph(GraphChoice):
    """The fault: what this rank asked for is what it runs, whatever the others asked for."""

    def choose(self, plan: StepPlan, agreed: AgreedStep) -> AgreedStep:
        if plan.mode == EAGER:
            return agreed
        return dataclasses.replace(agreed, mode=GRAPH, sizes=(plan.padded_tokens,) * len(agreed.sizes))


def policies(settings: RunSettings, rank: int) -> Policies:
    """fault: each by itself; control and fix are the engine's own."""
    return Policies(graphs=OwnGraph()) if settings.variant == "fault" else Policies()


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """control: no graphs; fault and fix: with them."""
    config = settings.server()
    if settings.variant != "control":
        return config
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, mode="eager"))


def hang(settings: RunSettings) -> Expected:
    """The first step in which the ranks' own choices differ."""
    verdict = "crash" if settings.backend == "gloo" else "deadlock"
    sizes = settings.engine.graph_sizes
    first_step = 1 + 2 * len(sizes)  # after the profile step, and two steps of capture for each size
    for step, live_rows in enumerate(step_rows(settings.requests(), settings.engine), start=first_step):
        rows = [max(1, number) for number in live_rows]  # idle ranks bring a dummy token
        graphs = [next((size for size in sizes if size >= number), None) for number in rows]
        stated = [(graph,) * len(rows) if graph else tuple(rows) for graph in graphs]
        if len(set(stated)) > 1:
            return Expected(verdict, "sizes", _provable(stated), step, "layers.0.moe")
    return CLEAN


def _provable(stated: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Ranks that state another rank's size against its own word and that of all others. Where several ranks replay
    graphs of other sizes, it is one word against another: the sizes show that they differ, not who left the agreement.
    """
    everyone = range(len(stated))

    def alone_against(rank: int, owner: int) -> bool:
        others = [stated[other][owner] for other in everyone if other not in (rank, owner)]
        return stated[rank][owner] != stated[owner][owner] and bool(others) and set(others) == {stated[owner][owner]}

    return tuple(rank for rank in everyone if any(alone_against(rank, owner) for owner in everyone if owner != rank))


SCENARIO = Scenario(
    name="graph_mode",
    summary="graph or eager, padded or not, is decided by each rank instead of by the lowest mode of all",
    source="vllm#25906, vllm-ascend#13827",
    policies=policies,
    hang=hang,
    server=server,
    defaults={
        # One size and busy ranks: the first step that parts them then has mostly one odd rank, which can be named.
        "engine": {"mode": "graphs", "capture_sizes": (4,)},
        "workload": {"max_requests": 6, "max_idle_ranks": 1, "max_arrival_step": 0},
    },
)
