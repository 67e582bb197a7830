"""One rank compiles kernels in the middle of the first step; the other ranks wait for its lock and log nothing.

Upstream: vLLM issues 41865 ("worker 0 compiles for 172 s, the others hang") and 46764. On Hopper the GDN prefill is by
default a kernel that is compiled at its first use. Under expert parallelism the kernels of the experts are also
compiled at their first use, which is after the dispatch of layer 0. One rank compiles. The other ranks wait for its
lock file, without a time limit and without a log line. No rank makes progress, which looks like a deadlock. But every
rank follows the schedule, and the rank that holds the lock does not wait in a collective. The wait ends when the
compiler ends, so the verdict must never be a deadlock.

The control is the same server with a warm cache. The fix: compile before the first collective, and tell the waiting
ranks which rank compiles, with heartbeats and log lines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hybrid_moe_kernels import extension

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.startup.builds import BuildPlace, KernelBuilds
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings
from repro.lab.start.kernel_cache import of_rank

if TYPE_CHECKING:
    from hybrid_moe_kernels.extension import Extension

JIT = {"gdn_prefill_backend": "jit", "moe_backend": "jit"}


@dataclasses.dataclass(frozen=True)
class BuildAtFirstUse(KernelBuilds):
    """The fault: a kernel is built when a layer first needs it, under the extension loader's own lock.

    rank   the rank that has this policy; it uses a cache of its own if the run's kernel cache is split by rank
    """

    settings: RunSettings
    rank: int

    def prepare(self, extensions: Sequence[Extension], place: BuildPlace) -> None:
        pass

    def warm_up(self, run: Callable[[], None]) -> None:
        pass

    def first_use(self, extension: Extension, place: BuildPlace) -> None:
        extension.load(of_rank(place.cache, self.settings, self.rank), place.observer.local)


@dataclasses.dataclass(frozen=True)
class BuildEarly(KernelBuilds):
    """The fix: build before the first collective, as the engine does by default.

    The engine's own policy has one cache for all ranks. If the run's kernel cache is split, this policy uses a cache
    for each rank.

    rank   the rank that has this policy
    """

    settings: RunSettings
    rank: int

    def prepare(self, extensions: Sequence[Extension], place: BuildPlace) -> None:
        super().prepare(extensions, dataclasses.replace(place, cache=of_rank(place.cache, self.settings, self.rank)))


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: Kernels would be built at first use, but the cache is warm, so none is built.
    fault: Kernels are built at first use, because the cache is cold.
    fix: Kernels are built before the first collective.
    """
    builds = BuildEarly if settings.variant == "fix" else BuildAtFirstUse
    return Policies(builds=builds(settings, rank))


def hang(settings: RunSettings) -> Expected:
    """Predict the verdict `slow` in the step that first uses the kernels, or `clean` if no kernel is built.

    With a quiet window of more than 1 s, also accept `clean`, because the build can be shorter than the window.

    If the kernel cache is split, only rank 0 builds, and the other ranks wait for it in a collective. If a group
    timeout is set, too, predict a crash, because this collective times out.
    """
    if not settings.engine.compiles_kernels or settings.effective_kernel_cache == "warm":
        return CLEAN
    if settings.effective_kernel_cache == "split" and settings.group_timeout_s:
        return Expected("crash", "error", step=0)
    culprits = (0,) if settings.effective_kernel_cache == "split" else None
    return Expected("slow", culprits=culprits, step=0, or_else=CLEAN if settings.quiet_window_s > 1 else None)


def missing(settings: RunSettings) -> str:
    """Return why this machine cannot compile the kernels; "" if it can, or if the run compiles no kernels."""
    if settings.backend == "nccl" and settings.engine.moe_backend == "jit":
        return "the compiled experts are C++ for a CPU: with --backend nccl, use --moe-backend auto"
    return extension.missing() if settings.engine.compiles_kernels else ""


SCENARIO = Scenario(
    name="cold_jit",
    summary="one rank compiles kernels in the first step, the others wait for its lock and log nothing: no deadlock",
    source="vllm#41865, vllm#46764",
    policies=policies,
    hang=hang,
    refused=hang,
    missing=missing,
    defaults={"engine": JIT},
)
