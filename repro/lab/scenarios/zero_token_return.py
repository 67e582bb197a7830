"""An EP backend returns early from the dispatch of a rank that has no tokens.

Upstream: uccl issue 940. With zero tokens a rank has nothing to send, but the other ranks still need it in the same
collectives: they wait for its message of size zero, and for the results of its experts. The rank without tokens goes on
to the agreement of the next step and waits there, while the other ranks wait for it in the dispatch of the first layer.

The fix: a rank with zero tokens issues every collective, too. Its own size in the collective is zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import IdlePolicy, Policies
from hybrid_moe_ref.engine.serving.scheduler import live_ranks
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


FIRST_DISPATCH = "ep all_gather_v of layers.0.moe"


class IdleWithZeroTokens(IdlePolicy):
    """The trigger: an idle rank takes part in a step with an empty batch."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        return 0


class ReturnEarlyAtZeroTokens(AllGatherReduceScatter):
    """The fault: on a rank without tokens, dispatch and combine return before their collective."""

    def dispatch(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        return super().dispatch(experts, args) if len(args[0]) else args

    def combine(self, experts: nn.Module, args: object, partial_SH: Tensor) -> Tensor:
        return super().combine(experts, args, partial_SH) if len(partial_SH) else partial_SH


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: An idle rank runs a dummy token.
    fault: An idle rank runs zero tokens, and returns early from the dispatch.
    fix: An idle rank runs zero tokens, and takes part in every collective.
    """
    return {
        "control": Policies(),
        "fault": Policies(idle=IdleWithZeroTokens(), dispatch=ReturnEarlyAtZeroTokens),
        "fix": Policies(idle=IdleWithZeroTokens()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which some ranks are idle; the idle ranks are the culprits.

    The idle ranks skip the MoE of every layer, and wait in the agreement of the next step.
    """
    everyone = set(range(settings.num_ranks))
    for serve_step, live in enumerate(live_ranks(settings.requests(), settings.engine)):
        if 0 < len(live) < settings.num_ranks:
            idle = tuple(sorted(everyone - set(live)))
            # Step 0 is the profile run. The culprits wait in the agreement of the step after this one.
            return Expected("deadlock", "skipped", idle, serve_step + 2, "step", planned=FIRST_DISPATCH)
    return CLEAN


SCENARIO = Scenario(
    name="zero_token_return",
    summary="the dispatch returns early on a rank with zero tokens, and the others wait for this rank",
    source="uccl#940",
    policies=policies,
    hang=hang,
)
