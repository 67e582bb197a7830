"""A rank that finds its tuning result in a cache skips the all-reduces of tuning: the second start hangs.

Upstream: vLLM issues 57423, 54618 and pull request 57579. Tuning measures several tactics (ways to run a kernel). One
all-reduce per tactic averages its time over the ranks. Only rank 0 saves its result in the cache file, and at the next
start every rank reads this file. An entry of the file names the experts of the rank that saved the entry, so only rank
0 finds an entry for its experts. Rank 0 skips all timings and goes on to the next collective, while the other ranks
wait for rank 0 in the first timing. The first start, with an empty cache, does not hang.

The run starts the server twice in the same ranks, with one cache folder.

The fix: the ranks vote before the first timing, and use the cache only if all ranks have an entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies, Tuning
from repro.lab.scenarios import Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from hybrid_moe_ref.engine.startup.autotune import Chosen, ExpertTuner

SAVER = 0


class SavedByOne(Tuning):
    """The trigger: one rank saves its tuning result for all ranks, under a key that no other rank looks for."""

    def load(self, tuner: ExpertTuner) -> Chosen | None:
        return tuner.load("experts.json", _key(tuner))

    def save(self, tuner: ExpertTuner, chosen: Chosen) -> None:
        if tuner.rank == SAVER:
            tuner.save("experts.json", _key(tuner), chosen)


class SkipWhatIsCached(SavedByOne):
    """The fault: a rank that finds its tuning result in the cache skips the tuning, which contains all-reduces."""

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
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: Each rank saves its own tuning result.
    fault: One rank saves its result for all ranks.
    fix: One rank saves its result for all ranks, and the ranks vote on whether to use the cache.
    """
    return {
        "control": Policies(),
        "fault": Policies(tuning=SkipWhatIsCached()),
        "fix": Policies(tuning=SavedByOne()),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the second start.

    The rank that saved its result skips the tuning, and waits in the agreement of the next step. The other ranks wait
    in the first all-reduce of the tuning.
    """
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
