"""Each rank decides by itself whether to replay a CUDA graph, and of which size, although all ranks must do the same.

Upstream: vLLM pull request 25906 (a dummy run selected the graph for its own, unpadded number of tokens) and
vllm-ascend pull request 13827 (the ranks' modes were not synchronised, which hung when some ranks were idle and others
still ran). A graph's collectives have the size that was captured. A rank that replays a graph passes the graph's sizes.
A rank that runs eagerly passes the agreed sizes. In the first step in which the ranks need different graphs, their
sizes differ in the dispatch of the first layer.

The result depends on the backend. gloo ends a rank that receives more data than its buffer holds, and the other ranks
fail after it. NCCL uses different operations for equal and unequal sizes, so there it is a hang (not yet run on two
GPUs).

The fix is a vote: the mode is the MIN of all ranks' modes, the size is the MAX of all ranks' sizes, and every rank
uses the result.
"""

from __future__ import annotations

import dataclasses

from hybrid_moe_ref.engine.policies import GraphChoice, Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import step_rows
from hybrid_moe_ref.engine.step.plan import EAGER, GRAPH, AgreedStep, StepPlan
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings


class OwnGraph(GraphChoice):
    """The fault: a rank runs the mode and size that it proposed, whatever the others proposed."""

    def choose(self, plan: StepPlan, agreed: AgreedStep) -> AgreedStep:
        if plan.mode == EAGER:
            return agreed
        return dataclasses.replace(agreed, mode=GRAPH, sizes=(plan.padded_tokens,) * len(agreed.sizes))


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank. In the fault, each rank decides by itself. Control and fix use the engine's own
    policies."""
    return Policies(graphs=OwnGraph()) if settings.variant == "fault" else Policies()


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """Return the configuration. The control uses no graphs. Fault and fix use graphs."""
    config = settings.server()
    if settings.variant != "control":
        return config
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, mode="eager"))


def hang(settings: RunSettings) -> Expected:
    """Predict a failure in the first step in which the ranks' choices differ.

    With gloo the failure is a crash, with NCCL a deadlock.
    """
    verdict = "crash" if settings.backend == "gloo" else "deadlock"
    sizes = settings.engine.graph_sizes
    first_step = 1 + 2 * len(sizes)  # after the profile step, and two steps of capture for each size
    for step, live_rows in enumerate(step_rows(settings.requests(), settings.engine), start=first_step):
        rows = [max(1, number) for number in live_rows]  # idle ranks have a dummy token
        graphs = [next((size for size in sizes if size >= number), None) for number in rows]
        stated = [(graph,) * len(rows) if graph else tuple(rows) for graph in graphs]
        if len(set(stated)) > 1:
            return Expected(verdict, "sizes", _provable(stated), step, "layers.0.moe")
    return CLEAN


def _provable(stated: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the ranks that are provably wrong.

    Rank r is wrong if it passes a size for rank q that differs from the size that q itself and all other ranks pass. If
    several ranks replay graphs of different sizes, nothing is proven: the sizes differ, but do not show which rank
    departed from the agreement.

    stated: stated[r][q] is the size that rank r passes to the dispatch for rank q
    """
    everyone = range(len(stated))

    def alone_against(rank: int, owner: int) -> bool:
        others = [stated[other][owner] for other in everyone if other not in (rank, owner)]
        return stated[rank][owner] != stated[owner][owner] and bool(others) and set(others) == {stated[owner][owner]}

    return tuple(rank for rank in everyone if any(alone_against(rank, owner) for owner in everyone if owner != rank))


SCENARIO = Scenario(
    name="graph_mode",
    summary="each rank by itself decides between graph and eager, and the size, instead of by the lowest mode of all",
    source="vllm#25906, vllm-ascend#13827",
    policies=policies,
    hang=hang,
    server=server,
    defaults={
        # With one graph size and many busy ranks, mostly a single rank differs in the first step in which ranks differ.
        # Then the verdict can name this rank.
        "engine": {"mode": "graphs", "capture_sizes": (4,)},
        "workload": {"max_requests": 6, "max_idle_ranks": 1, "max_arrival_step": 0},
    },
)
