"""A rank is killed in the middle of a step, and the other ranks wait for it in the next collective.

Upstream: vLLM issue 39942. The out-of-memory killer, an operator or a fault in a driver can end the process. The
process logs nothing, and the backend reports little. With NCCL all other ranks wait for ever. With gloo the ranks that
were connected to the dead rank fail because the connection is closed, and all further ranks wait for the failed ranks.

A server cannot finish this step, but it can stop with an error. Each waiting rank checks whether the processes of the
other ranks still exist. The first rank that finds a process missing stops all ranks; the error names the dead rank.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from hybrid_moe_ref.engine.policies import Policies, StateBinding
from hybrid_moe_ref.engine.step.plan import AgreedStep, StepPlan
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

STEP = 3


class KilledInStep(StateBinding):
    """The trigger: the process is killed between the step's agreement and the first layer."""

    def bind(self, plan: StepPlan, agreed: AgreedStep, rebuild: Callable[[], AgreedStep]) -> AgreedStep:
        if plan.step == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return agreed


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In fault and fix, one rank has a policy that kills the rank's own process. The fix differs from the fault only by
    its default of `checks`: with "agree", every waiting rank checks that the processes of the other ranks still exist.
    """
    killed = settings.variant != "control" and rank == struck_rank(settings)
    return Policies(binding=KilledInStep()) if killed else Policies()


def hang(settings: RunSettings) -> Expected:
    """Predict the verdict if no rank checks the other processes: a crash with the dead rank as culprit.

    The other ranks wait for the dead rank, or fail with errors of the backend.
    """
    return Expected("crash", "dead_rank", (struck_rank(settings),), STEP)


def ends_well(settings: RunSettings) -> Expected:
    """Predict the verdict if waiting ranks check the other processes: a crash with the dead rank as culprit.

    Every living rank raises PeerLost with the same message.
    """
    return Expected("crash", "dead_rank", (struck_rank(settings),), STEP, error="PeerLost")


SCENARIO = Scenario(
    name="rank_death",
    summary="a rank is killed in the middle of a step, and the other ranks wait for it",
    source="vllm#39942",
    policies=policies,
    hang=hang,
    refused=ends_well,
    fixed=ends_well,
)
