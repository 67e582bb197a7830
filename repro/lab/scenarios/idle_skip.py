"""A rank with nothing scheduled returns before the step's agreement instead of running a dummy batch.

Upstream: vLLM issues 43547 and 28224. In 43547, a rank without tokens returns an empty output, and so never joins the
collective of the step. (With one of the executor backends this does not happen.) Here a rank that has served all its
requests takes part in no further step. The other ranks wait for this rank in the agreement of the next step.

The fix: every rank takes part. A rank without work runs the smallest possible batch.
"""

from __future__ import annotations

from hybrid_moe_ref.engine.policies import IdlePolicy, Policies
from hybrid_moe_ref.engine.serving.scheduler import live_ranks
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings


class LeaveWhenFinished(IdlePolicy):
    """The fault: a rank that has no request left, and will get none, takes part in no further step."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        return 1 if unfinished else None


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In the fault, a rank without requests takes part in no further step. Control and fix use the engine's own policies,
    with which an idle rank takes part in every step.
    """
    return Policies(idle=LeaveWhenFinished()) if settings.variant == "fault" else Policies()


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock. The culprits are the ranks that run out of requests first.

    These ranks take part in no further step, and the other ranks wait for them in the agreement of the next step.
    """
    live = live_ranks(settings.requests(), settings.engine)
    last_live_step = [
        max(step for step, ranks in enumerate(live) if rank in ranks) for rank in range(settings.num_ranks)
    ]
    first = min(last_live_step)
    # Step 0 is the profile run, so serve step i is step i + 1. Step first + 1 is the culprits' last step.
    return Expected(
        "deadlock", "skipped", tuple(r for r, step in enumerate(last_live_step) if step == first), first + 1
    )


SCENARIO = Scenario(
    name="idle_skip",
    summary="a rank with nothing scheduled returns before the agreement and skips the dummy batch",
    source="vllm#43547, vllm#28224",
    policies=policies,
    hang=hang,
)
