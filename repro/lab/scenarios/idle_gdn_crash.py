"""The launch of a GDN kernel fails on a rank without tokens, the program ignores the error, and the rank skips the MoE.

Upstream: SGLang issue 31594 (fixed by 31794). An idle rank runs a step of zero tokens. The linear-attention kernel
cannot be launched without sequences, and the loop for idle batches treats the exception as the end of the batch. So the
idle rank skips every dispatch and combine of the step, and waits in the agreement of the next step. The other ranks
wait for the idle rank in the dispatch of the first layer.

The fix: every rank takes part. A rank without sequences launches no kernel and continues the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import IdlePolicy, Policies, StateBinding
from hybrid_moe_ref.engine.serving.scheduler import live_ranks
from hybrid_moe_ref.engine.step.plan import AgreedStep, StepPlan, first_recurrent_layer
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64
FIRST_DISPATCH = "ep all_gather_v of layers.0.moe"


class IdleWithZeroTokens(IdlePolicy):
    """The trigger: an idle rank takes part in a step with an empty batch."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        return 0


class SwallowIdleErrors(IdleWithZeroTokens):
    """One half of the fault: an error in a batch without requests is only printed.

    The other half, the cause of the error, is in :class:`LaunchOverSequences`.
    """

    def run(self, execute: Callable[[], None]) -> None:
        try:
            execute()
        except RuntimeError as error:
            print(f"idle batch failed: {error}", flush=True)


class LaunchOverSequences(StateBinding):
    """The launch of the GDN kernel, with a grid computed from the longest sequence of the step."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        self.grid(plan)
        return agreed

    def grid(self, plan: StepPlan) -> tuple[int, int]:
        """Return the launch grid: (number of chunks of the longest sequence, number of sequences).

        One half of the fault is here: without sequences there is no longest sequence, and this method raises an error.
        """
        return -(-int(self.lengths(plan).max()) // CHUNK), len(self.lengths(plan))

    @staticmethod
    def lengths(plan: StepPlan) -> Tensor:
        """Return the number of tokens of each sequence; empty for an empty batch.

        For simplicity, all tokens of the step form one sequence.
        """
        import torch

        return torch.tensor([plan.num_tokens] if plan.num_tokens else [], dtype=torch.int64)


class LaunchOverNothing(LaunchOverSequences):
    """The fix: without sequences the grid is empty and no kernel is launched."""

    def grid(self, plan: StepPlan) -> tuple[int, int]:
        return super().grid(plan) if plan.num_tokens else (0, 0)


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: An idle rank runs a dummy token.
    fault: An idle rank runs zero tokens, and the launch fails.
    fix: An idle rank runs zero tokens, launches no kernel and continues the step.
    """
    return {
        "control": Policies(),
        "fault": Policies(idle=SwallowIdleErrors(), binding=LaunchOverSequences()),
        "fix": Policies(idle=IdleWithZeroTokens(), binding=LaunchOverNothing()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which some ranks are idle; the idle ranks are the culprits.

    The idle ranks skip the rest of this step, and wait in the agreement of the next step.
    """
    everyone = set(range(settings.num_ranks))
    for serve_step, live in enumerate(live_ranks(settings.requests(), settings.engine)):
        if 0 < len(live) < settings.num_ranks and first_recurrent_layer(settings.model.layer_pattern):
            idle = tuple(sorted(everyone - set(live)))
            # Step 0 is the profile run, so serve step i is step i + 1, and the step after it is i + 2.
            return Expected("deadlock", "skipped", idle, serve_step + 2, "step", planned=FIRST_DISPATCH)
    return CLEAN


SCENARIO = Scenario(
    name="idle_gdn_crash",
    summary="a GDN launch over zero tokens fails, the program ignores the error, and the rank skips the MoE",
    source="sglang#31594",
    policies=policies,
    hang=hang,
)
