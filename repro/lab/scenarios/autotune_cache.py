"""Ranks that find their tuning in a cache skip the all-reduces of those that do not: the second start hangs.

Mirrors vLLM issues 57423, 54618 and pull request 57579. Tuning averages the time of each tactic over the ranks, one
all-reduce for each. What was chosen is saved by rank 0 alone, every rank reads that file at the next start, and its
entries name the experts that a rank holds, so only rank 0 finds its own. It takes the short way past all timings, to
the next collective, while the others wait for it in the first of them. The first start, with an empty cache, is fine.

The run starts the server twice in the same ranks, with one cache folder.

The cure is a vote before the first timing: a cache counts only if all ranks have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies, Tuning
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from hybrid_moe_ref.engine.autotune import Chosen, ExpertTuner

SAVER = 0


class SavedByOne(Tuning):
    """The trigger: one rank saves for all, under a key that is its own."""

    def load(self, tuner: ExpertTuner) -> Chosen | None:
        return tuner.load("experts.json", _key(tuner))

    def save(self, tuner: ExpertTuner, chosen: Chosen) -> None:
        if tuner.rank == SAVER:
            tuner.save("experts.json", _key(tuner), chosen)


class SkipWhatIsCached(SavedByOne):
    """The fault: whoever finds its entry sees no reason to time anything."""

    def tune(self, tuner: ExpertTuner) -> None:
        tuner.declare(tuner.timings)
        chosen = self.load(tuner)
        if chosen is None:
            chosen = tuner.time_all()
            self.save(tuner, chosen)
        tuner.use(chosen)


def _key(tuner: ExpertTuner) -> str:
    return f"{tuner.key} ep {tuner.rank}"


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: a file per rank; fault and fix: one rank's file; fix: with the engine's vote."""
    return {
        "control": Policies(),
        "fault": Policies(tuning=SkipWhatIsCached()),
        "fix": Policies(tuning=SavedByOne()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """At the second start the saver is in the profile run's agreement, which is step 1; step 0 is the tuning."""
    return Expected("deadlock", "skipped", (SAVER,), 1, "step")


SCENARIO = Scenario(
    name="autotune_cache",
    summary="a rank with a warm tuning cache skips the all-reduce per tactic; hangs on the second start",
    source="vllm#54618, vllm#57423, vllm#57579",
    policies=policies,
    hang=hang,
    starts=2,
    defaults={"engine": {"autotune": True}},
)
