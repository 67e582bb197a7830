"""A rank with nothing scheduled returns before the step's agreement instead of running a dummy batch.

Mirrors vLLM issues 43547 (a zero-token rank returns an empty output unless one executor backend is used,
and so never joins the per-step collective) and 28224. The others wait for it in the agreement of the next step, in
which the idle rank said nothing was left to do.

The cure is that everyone takes part: a rank without work runs the smallest batch there is.
"""

from __future__ import annotations

from hybrid_moe_ref.engine.policies import IdlePolicy, Policies
from hybrid_moe_ref.engine.scheduler import live_ranks
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings


class LeaveWhenFinished(IdlePolicy):
    """The fault: without requests of its own, now or to come, a rank sees no reason to go on."""

    def dummy_tokens(self, unfinished: bool) -> int | None:
        return 1 if unfinished else None


def policies(settings: RunSettings, rank: int) -> Policies:
    """control and fix are the engine's own: its idle ranks take part."""
    return Policies(idle=LeaveWhenFinished()) if settings.variant == "fault" else Policies()


def hang(settings: RunSettings) -> Expected:
    """The ranks that run out of requests first leave, and the others wait for them in the agreement."""
    live = live_ranks(settings.requests(), settings.engine)
    last_live_step = [
        max(step for step, ranks in enumerate(live) if rank in ranks) for rank in range(settings.num_ranks)
    ]
    first = min(last_live_step)
    # Step 0 is the profile run, so serve step i is step i + 1; it is the last that they took part in.
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
