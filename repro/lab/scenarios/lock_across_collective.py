"""A rank holds the build lock while it waits in a collective, which the other ranks enter only after they had the lock.

No upstream report describes all of this. But build locks are common, and so is tuning with collectives (vLLM issue
54618 has an all-reduce for each tactic that the tuner times). A server that does both under one lock can hang like
this. At the first use of the experts a rank takes the lock and compiles the extension of the experts. The rank then
measures several ways to run the extension and sums up the times by an all-reduce, while it still holds the lock. The
other ranks wait for the lock, and so do not reach the all-reduce. The lock limits this wait: a waiting rank raises
LockTimeout after a deadline, or if the holder has sent no heartbeat for 15 s. But this ends the hang by an error, and
does not prevent it.

The fix: a rank holds the lock only during the build, and releases it before the ranks communicate. Build and tuning
come before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hybrid_moe_kernels.build_lock import BEAT_S, BuildLock, every

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.startup.builds import BuildPlace, KernelBuilds, ensure
from repro.lab.scenarios import Expected, Scenario
from repro.lab.scenarios.cold_jit import missing
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from hybrid_moe_kernels.extension import Extension

LOCK = "experts.lock"


def tune(extension: Extension, place: BuildPlace) -> None:
    """Choose the fastest way to run the experts, the same on all ranks. All ranks must call this.

    To choose the same way, the ranks sum up their times by an all-reduce. The fault calls this function while the rank
    holds the build lock.

    extension: the compiled code of the experts
    place: gives the all-reduce, as ``place.sum_up``
    """
    from hybrid_moe_kernels.lab import moe_experts

    times = place.sum_up(moe_experts.time_blocks(), extension.name)
    moe_experts.use_block_rows(moe_experts.BLOCK_ROWS[times.index(min(times))])


class TuneUnderLock(KernelBuilds):
    """The fault: at the first use of the experts, a rank builds and tunes under one lock. Tuning has an all-reduce."""

    def prepare(self, extensions: Sequence[Extension], place: BuildPlace) -> None:
        pass

    def warm_up(self, run: Callable[[], None]) -> None:
        pass

    def first_use(self, extension: Extension, place: BuildPlace) -> None:
        place.cache.mkdir(parents=True, exist_ok=True)
        with BuildLock(place.cache / LOCK, place.rank, place.deadline_s, place.observer.local, place.check) as lock:
            with every(BEAT_S, lock.beat):
                extension.load(place.cache)
            tune(extension, place)


class TuneAfterLock(KernelBuilds):
    """The fix: build under the lock, release the lock, then tune, all before the first step."""

    def prepare(self, extensions: Sequence[Extension], place: BuildPlace) -> None:
        for extension in extensions:
            ensure(extension, place)
            tune(extension, place)


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: The engine's own policy builds the extension, and nothing is tuned.
    fault: The rank builds and then measures the extension (`tune`, which has an all-reduce), all under the build lock.
    fix: The rank builds under the lock, and calls `tune` after it has released the lock.
    """
    builds = {"control": KernelBuilds, "fault": TuneUnderLock, "fix": TuneAfterLock}
    return Policies(builds=builds[settings.variant]())


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the phase `profile`, the first step.

    The culprit is the rank that gets the lock first. Any rank can be first, so the prediction names no culprit.
    """
    return Expected("deadlock", "lock", step=0, layer="moe_experts")


SCENARIO = Scenario(
    name="lock_across_collective",
    summary="the build lock is still held in an all-reduce that the others reach only after the lock",
    source="generic; vllm#54618",
    policies=policies,
    hang=hang,
    missing=missing,
    defaults={"engine": {"moe_backend": "jit"}},
)
