"""Refuse, before a server starts, a configuration whose ranks could deadlock.

    check_start(config)             raises Refused with one line, which names the flag to change
    check_start(config, policies)   also tries the policies in the roles of different ranks: with and without requests,
                                    with and without a tuning cache

A policy must make every rank issue the same collectives, whatever the state of the rank is. To try a policy, this file
calls it with substitutes for the functions that communicate; they only record what the policy does. If the policy
raises an error in such a trial, the server does not start. The trials find the known faults, but not all possible
faults. If another fault leads to a wrong collective while the server runs, the schedule guard refuses this collective.

This file uses neither torch nor communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.step.plan import EAGER, GRAPH, RECURRENT, AgreedStep, StepPlan, first_recurrent_layer
from hybrid_moe_ref.engine.step.protocol import Protocol, protocol_of

if TYPE_CHECKING:
    from hybrid_moe_ref.engine.startup.autotune import ExpertTuner

NUM_RANKS = 2  # number of ranks in the trials


class Refused(ConfigError):
    """A configuration that could deadlock. The text says why, and what to change."""


def check_start(config: ServerConfig, policies: Policies | None = None) -> list[str]:
    """Raise Refused if the ranks could deadlock. With `config.allow_unsafe`, return a line for each reason instead.

    policies: the policies with which the server will run; None: check only the settings, no policy
    """
    reasons = list(findings(config, policies))
    if reasons and not config.allow_unsafe:
        raise Refused(f"{reasons[0]} (to start nevertheless: --allow-unsafe)")
    return reasons


def findings(config: ServerConfig, policies: Policies | None = None) -> Iterator[str]:
    """Yield a line for each setting or policy that could make the ranks deadlock.

    policies: the policies with which the server will run; None: check only the settings, no policy
    """
    yield from _unagreed(config)
    if policies is not None:
        for trial in (
            _leaves_when_idle,
            _agrees_on_some_ranks_only,
            _chooses_its_own_graph,
            _tunes_without_vote,
            _preempts_late,
        ):
            yield from trial(config, policies)


def _unagreed(config: ServerConfig) -> Iterator[str]:
    """Yield a finding if a model with recurrent state uses expert parallelism, and ranks do not compare schedules.

    Yield a second finding if this server also uses graphs.
    """
    parallel = config.parallel
    exchanges = parallel.expert_parallel and parallel.dp_size > 1 and config.model.num_experts > 0
    kinds = [RECURRENT[kind] for kind in RECURRENT if kind in config.model.layer_pattern]
    if config.checks != "observe" or not exchanges or not kinds:
        return
    layers = f"models with {' and '.join(kinds)} hybrid layers while the ranks do not agree on their schedules"
    change = f"use --checks agree, or tensor parallelism instead (tp_size = {parallel.world_size})"
    yield f"expert parallelism is not supported for {layers}: {change}"
    if config.engine.mode == "graphs":
        yield f"graph mode is not supported for {layers}: use --checks agree, or engine.mode = eager"


def _leaves_when_idle(config: ServerConfig, policies: Policies) -> Iterator[str]:
    """Yield a finding if a rank without requests would no longer take part in the steps."""
    if policies.idle.dummy_tokens(unfinished=False) is None:
        yield (
            f"{_name(policies.idle)}: a rank without requests would leave while other ranks still wait for it: an idle "
            "rank must run a dummy batch (policies.idle)"
        )


def _agrees_on_some_ranks_only(config: ServerConfig, policies: Policies) -> Iterator[str]:
    """Yield a finding if ranks with requests would issue more or fewer step agreements in a step than idle ranks."""
    layer = first_recurrent_layer(config.model.layer_pattern)
    if layer is None:
        return
    protocol = protocol_of(config.engine)
    busy, idle = (_exchanges(protocol, policies, StepPlan(-2 - live, 1, live), layer[1]) for live in (1, 0))
    if busy != idle:
        yield (
            f"{_name(policies.binding)} and {_name(policies.agreement)}: at {layer[1]} a rank with requests would "
            f"issue {busy} agreements in a step, but an idle rank {idle}: agree once in a step, and give later callers "
            "the same answer (policies.agreement)"
        )


def _exchanges(protocol: Protocol, policies: Policies, plan: StepPlan, layer: str) -> int:
    """Return how many step agreements a rank would issue from the beginning of a step up to `layer`.

    plan: the rank's proposal for this step; layer: the name of the model's first recurrent layer
    """
    count = 0

    def exchange(plan: StepPlan, asker: str) -> AgreedStep:
        nonlocal count
        count += 1
        return protocol.resolve([[number] * NUM_RANKS for number in protocol.column(plan)])

    agreed = policies.agreement.agree(plan, exchange, "step")
    policies.binding.bind(plan, agreed, lambda: policies.agreement.agree(plan, exchange, layer))
    return count


def _chooses_its_own_graph(config: ServerConfig, policies: Policies) -> Iterator[str]:
    """Yield a finding if a rank would replay a graph after the ranks agreed to run eagerly."""
    plan = StepPlan(-1, 1, 1, padded_tokens=4, mode=GRAPH)
    agreed = AgreedStep((1, 9), EAGER, False)
    if config.engine.mode == "graphs" and policies.graphs.choose(plan, agreed) != agreed:
        yield (
            f"{_name(policies.graphs)}: graph mode is not supported if each rank chooses its graph by itself: run what "
            "the ranks agreed on (policies.graphs), or use engine.mode = eager"
        )


def _tunes_without_vote(config: ServerConfig, policies: Policies) -> Iterator[str]:
    """Yield a finding if a rank with a saved tuning result would skip the all-reduces of tuning.

    The other ranks would wait for this rank in the first of these all-reduces.
    """
    if not config.engine.autotune:
        return
    tuner = _OneHasSaved()
    policies.tuning.tune(cast("ExpertTuner", tuner))
    if not tuner.timed:
        yield (
            f"{_name(policies.tuning)}: a rank with a saved tuning result would skip all-reduces that the other ranks "
            "issue. Let the ranks vote before they use saved results (policies.tuning), or set engine.autotune = false"
        )


def _preempts_late(config: ServerConfig, policies: Policies) -> Iterator[str]:
    """Yield a finding if a rank would not preempt before the step agreement."""
    calls: list[str] = []
    policies.preemption.before_step(lambda: calls.append("make room"))
    if not calls:
        yield (
            f"{_name(policies.preemption)}: a rank whose cache is full would leave a step on which the ranks have "
            "agreed: make room before the step (policies.preemption)"
        )


class _OneHasSaved:
    """A substitute for the `ExpertTuner` of a rank that has a saved tuning result while the other ranks have none."""

    rank, key, timings = 0, "", ()

    def __init__(self) -> None:
        self.timed = False

    def load(self, file_name: str, key: str) -> dict[int, str]:
        return {1: "saved"}

    def vote(self, mine: bool) -> bool:
        return False

    def time_all(self) -> dict[int, str]:
        self.timed = True
        return {1: "timed"}

    def declare(self, schedule: Any) -> None: ...
    def save(self, file_name: str, key: str, chosen: Any) -> None: ...
    def use(self, chosen: Any) -> None: ...


def _name(policy: object) -> str:
    return type(policy).__name__
