"""Each rank decides by itself whether to replay a CUDA graph, and of which size, although all ranks must do the same.

Upstream: vLLM pull request 25906 (a dummy run selected the graph for its own, unpadded number of tokens) and
vllm-ascend pull request 13827 (the ranks' modes were not synchronised, which hung when some ranks were idle and others
still ran). The collectives of a graph have the sizes with which the graph was captured. A rank that replays a graph
passes these sizes; a rank that runs eagerly passes the agreed sizes. In the first step in which the ranks need
different graphs, the sizes differ between ranks in the dispatch of the first layer.

The result depends on the backend. gloo ends a rank that receives more data than its buffer holds, and then the other
ranks fail, too. NCCL uses different operations for equal and unequal sizes, so we expect a hang (not yet run on two
GPUs).

The fix is a vote. All ranks run eagerly if one rank must; otherwise all ranks replay a graph, of the largest size that
any rank proposes.
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
    """The fault: a rank that proposed a graph replays this graph, whatever the ranks agreed on."""

    def choose(self, plan: StepPlan, agreed: AgreedStep) -> AgreedStep:
        if plan.mode == EAGER:
            return agreed
        return dataclasses.replace(agreed, mode=GRAPH, sizes=(plan.padded_tokens,) * len(agreed.sizes))


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In the fault, each rank decides by itself which graph to replay. Control and fix use the engine's own policies.
    """
    return Policies(graphs=OwnGraph()) if settings.variant == "fault" else Policies()


def server(settings: RunSettings, rank: int) -> ServerConfig:
    """Return the server's configuration. The control uses no graphs. Fault and fix use graphs."""
    config = settings.server()
    if settings.variant != "control":
        return config
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, mode="eager"))


def hang(settings: RunSettings) -> Expected:
    """Predict a crash (gloo) or a deadlock (NCCL) in the first step in which ranks dispatch with different sizes."""
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
    """Return the ranks that provably pass a wrong size.

    Rank r is wrong if it passes a size for rank q that differs from the size that q itself and all other ranks pass. In
    a group of two ranks no rank is provably wrong, because there is no third rank to compare with.

    stated: stated[r][q] is the size that rank r passes to the dispatch for rank q
    """
    everyone = range(len(stated))

    def alone_against(rank: int, owner: int) -> bool:
        others = [stated[other][owner] for other in everyone if other not in (rank, owner)]
        return stated[rank][owner] != stated[owner][owner] and bool(others) and set(others) == {stated[owner][owner]}

    return tuple(rank for rank in everyone if any(alone_against(rank, owner) for owner in everyone if owner != rank))


SCENARIO = Scenario(
    name="graph_mode",
    summary="each rank decides by itself whether to replay a graph, and of which size, without a vote of all ranks",
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
