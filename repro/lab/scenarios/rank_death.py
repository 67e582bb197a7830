"""A rank is killed in the middle of a step, and its peers wait for it in the next collective.

Mirrors vLLM issue 39942. What ends the process does not matter: the kernel's out-of-memory killer, an operator, a
fault in a driver. It says nothing, and the backend tells little: NCCL waits for ever; gloo fails with a closed
connection on those ranks that were talking to the dead one, which leaves the rest waiting for them.

No server can finish these steps. What it can do is to end well: a rank that waits looks whether its peers' processes
still exist, and the first to miss one stops all of them with its name.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from hybrid_moe_ref.engine.plan import AgreedStep, StepPlan
from hybrid_moe_ref.engine.policies import Policies, StateBinding
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

STEP = 3


class KilledInStep(StateBinding):
    """The trigger: between the step's agreement and the first layer the process is killed, as from outside."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        if plan.step == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return agreed


def policies(settings: RunSettings, rank: int) -> Policies:
    """fault and fix: one rank is killed. What differs is that in the fix ranks look for each other (checks)."""
    killed = settings.variant != "control" and rank == struck_rank(settings)
    return Policies(binding=KilledInStep()) if killed else Policies()


def hang(settings: RunSettings) -> Expected:
    """The dead rank is the cause, and the waits or broken connections of the others its consequence."""
    return Expected("crash", "dead_rank", (struck_rank(settings),), STEP)


def ends_well(settings: RunSettings) -> Expected:
    """Every rank that lives raises the same error, which names the dead one."""
    return Expected("crash", "dead_rank", (struck_rank(settings),), STEP, error="PeerLost")


SCENARIO = Scenario(
    name="rank_death",
    summary="a rank is killed in the middle of a step, and its peers wait for it",
    source="vllm#39942",
    policies=policies,
    hang=hang,
    refused=ends_well,
    fixed=ends_well,
)
