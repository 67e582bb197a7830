"""A rank whose requests are about to end skips the drafter (the MTP layer that drafts tokens), which contains experts.

Upstream: vLLM issues 44185 and 49027, and pull requests 29422, 40589 and 44954. A request near its maximum length has
no room for a draft. A rank that has only such requests skips the drafter. The other ranks run the drafter, the idle
ranks with a dummy batch. The MTP layer contains an MoE, so all ranks must run this layer together. The ranks that run
the MTP layer wait in its dispatch, and the rank that skipped this layer waits in the agreement of the next step.

The fix: in each step, every rank runs the drafter the same number of times, which is a setting of the server. A rank
discards the drafts that it does not need.
"""

from __future__ import annotations

from hybrid_moe_ref.engine.policies import DraftPolicy, Policies
from hybrid_moe_ref.engine.serving.scheduler import Scheduler
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

FIRST_DISPATCH = "ep all_gather_v of mtp.layers.0.moe"


class SkipWhenNothingFits(DraftPolicy):
    """The fault: a rank skips the drafter (the layer that drafts tokens) when none of its requests can use a draft."""

    def num_passes(self, num_drafts: int, room: int | None) -> int:
        fits = room is None or room > 0
        return num_drafts if fits else 0


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In the fault, each rank decides by itself whether it runs the drafter (the layer that drafts tokens). Control and
    fix use the engine's own policies, with which every rank runs the drafter equally often.
    """
    return Policies(drafts=SkipWhenNothingFits()) if settings.variant == "fault" else Policies()


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which some ranks, but not all, skip the drafter.

    A rank skips the drafter (the layer that drafts tokens) if none of its requests needs more than one further token.

    The prediction is exact only if every draft is rejected, because an accepted draft shortens a request. With random
    weights about one draft in vocab_size is accepted.
    """
    schedulers = [Scheduler(requests, settings.engine) for requests in settings.requests()]
    serve_step = 0
    while any(scheduler.unfinished for scheduler in schedulers):
        skip = []
        for rank, scheduler in enumerate(schedulers):
            running = scheduler.schedule(serve_step)
            scheduler.pretend()
            if running and all(request.num_left <= 1 for request in running):
                skip.append(rank)
        if 0 < len(skip) < settings.num_ranks:
            # Step 0 is the profile run. The culprits wait in the agreement of the step after this one.
            return Expected("deadlock", "skipped", tuple(skip), serve_step + 2, "step", planned=FIRST_DISPATCH)
        serve_step += 1
    return CLEAN


SCENARIO = Scenario(
    name="drafter_skip",
    summary="a rank whose requests are about to end skips the MTP drafter, which dispatches to experts",
    source="vllm#44185, vllm#49027",
    policies=policies,
    hang=hang,
    defaults={"model": {"num_mtp_layers": 1}, "engine": {"num_drafts": 2}},
)
