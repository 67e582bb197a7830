"""One rank does its housekeeping between two steps while all others wait for it: slow, and not a deadlock.

Mirrors the complaint behind vLLM issue 46764 and its like, where all ranks but one stand in a collective and the
server looks dead, although the one is merely late: it writes metrics or a cache to a file system that answers slowly,
collects garbage, or is throttled. Everybody is in the same collective but the straggler, who is in none; so long as it
works there is nothing to untangle, and the right verdict is its name and how long it has been at it.

The cure: what nobody waits for does not stand between two steps. The rank hands it to a thread and goes on.
"""

from __future__ import annotations

import threading
import time

from hybrid_moe_ref.engine.plan import AgreedStep, StepPlan
from hybrid_moe_ref.engine.policies import Exchange, Policies, StepAgreement
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

STEP = 3
QUIET_WINDOWS = 5


class KeepHouse(StepAgreement):
    """The fault: before it agrees on a step the rank writes what it has to write, however long that takes."""

    def __init__(self, write_s: float) -> None:
        super().__init__()
        self.write_s = write_s

    def agree(self, plan: StepPlan, exchange: Exchange, layer: str) -> AgreedStep:
        if plan.step == STEP:
            self.keep_house()
        return super().agree(plan, exchange, layer)

    def keep_house(self) -> None:
        """The writing itself, in the way of the step."""
        time.sleep(self.write_s)  # a blocking write to a file system that does not answer


class KeepHouseAside(KeepHouse):
    """The trigger with the cure: the same writing, in a thread that no step waits for."""

    def keep_house(self) -> None:
        threading.Thread(target=time.sleep, args=(self.write_s,), daemon=True).start()


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: nothing to write; fault: one rank writes between two steps; fix: it writes beside them."""
    if settings.variant == "control" or rank != struck_rank(settings):
        return Policies()
    kind = KeepHouse if settings.variant == "fault" else KeepHouseAside
    return Policies(agreement=kind(QUIET_WINDOWS * settings.quiet_window_s))


def hang(settings: RunSettings) -> Expected:
    """The straggler is named, whatever the quiet window; the guard has nothing to refuse."""
    return Expected("slow", None, (struck_rank(settings),), STEP)


SCENARIO = Scenario(
    name="straggler",
    summary="one rank is late because it does housekeeping between two steps; the others wait, and nothing is wrong",
    source="vllm#46764",
    policies=policies,
    hang=hang,
    refused=hang,
)
