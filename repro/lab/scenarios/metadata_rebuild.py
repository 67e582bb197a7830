"""A Gated DeltaNet layer rebuilds the step's metadata, which holds a collective that idle ranks never join.

Mirrors ROCm/ATOM pull request 1690 (Qwen3.5 under SGLang, DP x EP). There, binding a GDN layer's state set a new
forward context, and setting a context builds the data-parallel metadata with an all-reduce over the DP CPU
group. Ranks that run requests hold GDN metadata and bind; a rank on a dummy batch holds none and skips the
binder. As long as every rank is busy, all ranks join the extra all-reduce, and it does no harm. In the first step in
which one rank is idle, the busy ranks wait for it in the all-reduce, while it waits for them in the expert
dispatch of the same layer: a cycle over two groups, in which neither group alone shows more than an absence.

The cure is not to skip the call there but to make a second one free: one agreement per step, and later
callers get its answer.
"""

from __future__ import annotations

from collections.abc import Callable

from hybrid_moe_ref.engine.plan import AgreedStep, StepPlan, first_recurrent_layer
from hybrid_moe_ref.engine.policies import Exchange, Policies, StateBinding, StepAgreement
from hybrid_moe_ref.engine.scheduler import live_ranks
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

FIRST_DISPATCH = "ep all_gather_v of layers.0.moe"


class RebindWithMetadata(StateBinding):
    """The trigger: a rank that has recurrent state to bind builds the step's metadata again while it is at it."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        has_state = plan.num_live > 0
        return rebuild() if has_state else agreed


class AgreeOnEveryCall(StepAgreement):
    """The fault: building the metadata always communicates, however often it is asked for."""

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        return exchange(plan, layer)


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: nobody rebuilds; fault: rebuilding communicates; fix: it is answered from the step's agreement."""
    return {
        "control": Policies(),
        "fault": Policies(agreement=AgreeOnEveryCall(), binding=RebindWithMetadata()),
        "fix": Policies(binding=RebindWithMetadata()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """The first step in which some ranks are live and others idle; its culprits are the live ones."""
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
