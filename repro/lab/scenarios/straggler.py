"""One rank does housekeeping (writes metrics) between two steps while all others wait for it: slow, not a deadlock.

Upstream: vLLM issue 46764 and similar reports, where all ranks but one (the straggler) wait in a collective and the
server looks dead. But the straggler is only late: it writes metrics or a cache to a slow file system, collects garbage,
or is throttled. All other ranks are in the same collective, and the straggler is in no collective. While the straggler
works, there is no deadlock. The right verdict names the straggler and how long it has been working.

The fix: a rank lets a thread do work whose result no step needs, and begins the next step without delay.
"""

from __future__ import annotations

import threading
import time

from hybrid_moe_ref.engine.policies import Exchange, Policies, StepAgreement
from hybrid_moe_ref.engine.step.plan import AgreedStep, StepPlan
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

STEP = 3
QUIET_WINDOWS = 5


class WriteMetrics(StepAgreement):
    """The fault: the rank writes its metrics before it agrees on a step, however long the write takes."""

    def __init__(self, write_s: float) -> None:
        super().__init__()
        self.write_s = write_s

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        if plan.step == STEP:
            self.write_metrics()
        return super().agree(plan, exchange, layer)

    def write_metrics(self) -> None:
        """Write the metrics. The step waits until they are written."""
        time.sleep(self.write_s)  # represents a blocking write to a file system that does not answer


class WriteMetricsInThread(WriteMetrics):
    """The fix: the same write, in a thread that no step waits for."""

    def write_metrics(self) -> None:
        threading.Thread(target=time.sleep, args=(self.write_s,), daemon=True).start()


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: No rank writes metrics.
    fault: One rank writes metrics between two steps.
    fix: One rank writes metrics in a thread.
    """
    if settings.variant == "control" or rank != struck_rank(settings):
        return Policies()
    kind = WriteMetrics if settings.variant == "fault" else WriteMetricsInThread
    return Policies(agreement=kind(QUIET_WINDOWS * settings.quiet_window_s))


def hang(settings: RunSettings) -> Expected:
    """Predict the verdict `slow` with the straggler as culprit, because it is late by several quiet windows.

    The setting `checks` does not change the verdict, because the straggler keeps to its schedule.
    """
    return Expected("slow", None, (struck_rank(settings),), STEP)


SCENARIO = Scenario(
    name="straggler",
    summary="one rank is late because it does housekeeping between two steps; the others wait, without a deadlock",
    source="vllm#46764",
    policies=policies,
    hang=hang,
    refused=hang,
)
