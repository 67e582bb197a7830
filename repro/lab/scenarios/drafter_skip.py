"""A rank whose requests are about to end skips the drafter, which has experts of its own.

Mirrors vLLM issues 44185 and 49027 (and pull requests 29422, 40589 and 44954, which take it up): near the greatest
length no draft fits any more, so the rank leaves the drafter out. Its peers do not, and neither do idle ranks, which
run a dummy batch through it. The MTP layer holds a MoE, so its passes are collective: the others wait in its dispatch,
the one that skipped it in the agreement of the next step.

The cure is that everyone takes part: the number of passes is the server's setting, and drafts that nobody needs are
thrown away.
"""

from __future__ import annotations

from hybrid_moe_ref.engine.policies import DraftPolicy, Policies
from hybrid_moe_ref.engine.scheduler import Scheduler
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

FIRST_DISPATCH = "ep all_gather_v of mtp.layers.0.moe"


class SkipWhenNothingFits(DraftPolicy):
    """The fault: a rank none of whose requests could use a draft does not run the drafter."""

    def num_passes(self, num_drafts: int, room: int | None) -> int:
        fits = room is None or room > 0
        return num_drafts if fits else 0


def policies(settings: RunSettings, rank: int) -> Policies:
    """control and fix are the engine's own: the same number of passes on every rank, whatever they are good for."""
    return Policies(drafts=SkipWhenNothingFits()) if settings.variant == "fault" else Policies()


def hang(settings: RunSettings) -> Expected:
    """The first step in which some ranks have requests of which each ends within one more token, and others do not.

    Exact so long as no guess is right: a right one shortens a request. Random weights guess right once in a vocabulary.
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
            # Step 0 is the profile run; they wait in the agreement of the step after this one.
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
