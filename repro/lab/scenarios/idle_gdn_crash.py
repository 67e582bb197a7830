"""A Gated DeltaNet launch fails on a rank without tokens, the error is swallowed, and the rank skips the MoE.

Mirrors SGLang issue 31594 (fixed by 31794): an idle rank runs a step of zero tokens, the linear-attention kernel
cannot be launched over nothing, and the loop that drives idle batches takes the failure for the end of an idle batch.
The rank has left out every dispatch and combine of the step. It goes on to the agreement of the next one, where it
waits for its peers, who wait for it in the dispatch of the first layer.

The cure is that everyone takes part: over nothing there is nothing to launch, and the step goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.plan import AgreedStep, StepPlan, first_recurrent_layer
from hybrid_moe_ref.engine.policies import IdlePolicy, Policies, StateBinding
from hybrid_moe_ref.engine.scheduler import live_ranks
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64
FIRST_DISPATCH = "ep all_gather_v of layers.0.moe"


class IdleWithZeroTokens(IdlePolicy):
    """The trigger: an idle rank takes part with an empty batch."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        return 0


class SwallowIdleErrors(IdleWithZeroTokens):
    """The fault, second half: what goes wrong in an idle batch is logged, for it can have harmed no request."""

    def run(self, execute: Callable[[], None]) -> None:
        try:
            execute()
        except RuntimeError as error:
            print(f"idle batch failed: {error}", flush=True)


class LaunchOverSequences(StateBinding):
    """The launch of the chunked kernel: its grid follows from the longest sequence of the step."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        self.grid(plan)
        return agreed

    def grid(self, plan: StepPlan) -> tuple[int, int]:
        """Chunks of the longest sequence, and sequences. The fault, first half: of no sequences none is longest."""
        return -(-int(self.lengths(plan).max()) // CHUNK), len(self.lengths(plan))

    @staticmethod
    def lengths(plan: StepPlan) -> Tensor:
        """Tokens of each sequence, one sequence for simplicity; none in an empty batch."""
        import torch

        return torch.tensor([plan.num_tokens] if plan.num_tokens else [], dtype=torch.int64)


class LaunchOverNothing(LaunchOverSequences):
    """The cure: without sequences the grid is empty, and nothing is launched."""

    def grid(self, plan: StepPlan) -> tuple[int, int]:
        return super().grid(plan) if plan.num_tokens else (0, 0)


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: idle ranks bring a token; fault: none, and the launch fails unseen; fix: none, and the step goes on."""
    return {
        "control": Policies(),
        "fault": Policies(idle=SwallowIdleErrors(), binding=LaunchOverSequences()),
        "fix": Policies(idle=IdleWithZeroTokens(), binding=LaunchOverNothing()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """In the first step with idle ranks these leave the rest of it out, and wait in the next one's agreement."""
    everyone = set(range(settings.num_ranks))
    for serve_step, live in enumerate(live_ranks(settings.requests(), settings.engine)):
        if 0 < len(live) < settings.num_ranks and first_recurrent_layer(settings.model.layer_pattern):
            idle = tuple(sorted(everyone - set(live)))
            # Step 0 is the profile run, so serve step i is step i + 1, and the next one step i + 2.
            return Expected("deadlock", "skipped", idle, serve_step + 2, "step", planned=FIRST_DISPATCH)
    return CLEAN


SCENARIO = Scenario(
    name="idle_gdn_crash",
    summary="a GDN launch over zero tokens fails, the error is swallowed, and the rank skips the MoE",
    source="sglang#31594",
    policies=policies,
    hang=hang,
)
