"""A Gated DeltaNet layer rebuilds the step's metadata, which takes a collective that idle ranks do not join.

Upstream: ROCm/ATOM pull request 1690 (Qwen3.5 under SGLang, DP x EP). There, a GDN layer connects its recurrent state
to the requests ("binds" the state). For this the layer sets a new forward context, which builds the data-parallel
metadata by an all-reduce over the DP CPU group. Only ranks with requests have GDN metadata and bind state; a rank with
a dummy batch does not. As long as every rank has requests, all ranks join the extra all-reduce, and the server works.
In the first step with an idle rank, the ranks with requests wait for the idle rank in the all-reduce, and the idle rank
waits for them in the expert dispatch of the same layer. The cycle spans two groups. In each group alone, it looks as if
some ranks were only late.

The fix keeps the rebuild, but makes it local. The ranks agree once per step, and a later rebuild in this step uses the
result of the agreement, without communication.
"""

from __future__ import annotations

from collections.abc import Callable

from hybrid_moe_ref.engine.policies import Exchange, Policies, StateBinding, StepAgreement
from hybrid_moe_ref.engine.serving.scheduler import live_ranks
from hybrid_moe_ref.engine.step.plan import AgreedStep, StepPlan, first_recurrent_layer
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

FIRST_DISPATCH = "ep all_gather_v of layers.0.moe"


class RebindWithMetadata(StateBinding):
    """The trigger: to bind recurrent state to its requests, a rank with requests rebuilds the step's metadata.

    The metadata is the result of the step agreement: the sizes with which all ranks run the step.
    """

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        has_state = plan.num_live > 0
        return rebuild() if has_state else agreed


class AgreeOnEveryCall(StepAgreement):
    """The fault: every build of the step's metadata issues an all-reduce, even the second build in a step."""

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        return exchange(plan, layer)


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: No layer rebuilds the step's metadata.
    fault: On ranks with requests a layer rebuilds the metadata by an all-reduce.
    fix: On ranks with requests a layer rebuilds the metadata from the result of the step's agreement.
    """
    return {
        "control": Policies(),
        "fault": Policies(agreement=AgreeOnEveryCall(), binding=RebindWithMetadata()),
        "fix": Policies(binding=RebindWithMetadata()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which some ranks have requests and others are idle.

    The ranks with requests are the culprits.
    """
    binder = first_recurrent_layer(settings.model.layer_pattern)
    for serve_step, live in enumerate(live_ranks(settings.requests(), settings.engine)):
        if binder and 0 < len(live) < settings.num_ranks:
            # Step 0 is the profile run, so serve step i is step i + 1.
            return Expected("deadlock", "extra", tuple(live), serve_step + 1, binder[1], planned=FIRST_DISPATCH)
    return CLEAN


SCENARIO = Scenario(
    name="metadata_rebuild",
    summary="a GDN layer rebuilds the DP metadata on ranks with requests: one all-reduce more than idle ranks issue",
    source="ROCm/ATOM#1690",
    policies=policies,
    hang=hang,
)
