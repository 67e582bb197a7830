"""The compiled kernels that a run finds when it starts: none, all, or all but rank 0's.

A run has a cache of its own, in its directory. A warm one is copied from the user's, where a process of its own first
builds what is missing: ``python -m repro.kernel_cache RUN_DIR``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from repro import process
from repro.rundir import RunDir, read_json
from repro.settings import RunSettings


class CannotBuild(RuntimeError):
    """This machine cannot compile the kernels; the text says why."""


def folder(run_dir: RunDir, settings: RunSettings) -> Path:
    """The folder that the run's server keeps things in."""
    return Path(settings.engine.cache_dir or run_dir.cache)


def fill(run_dir: RunDir, settings: RunSettings) -> None:
    """Put into the run's cache what it is to find there.

    Raises CannotBuild, for want of a compiler for one.
    """
    if not settings.engine.compiles_kernels or settings.effective_kernel_cache == "cold":
        return
    command = [sys.executable, "-m", "repro.kernel_cache", str(run_dir.root)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise CannotBuild(f"no warm kernel cache: {reason[0]}")


def of_rank(cache: Path, settings: RunSettings, rank: int) -> Path:
    """Where a rank looks for compiled kernels."""
    return cache / f"rank{rank:03d}" if settings.effective_kernel_cache == "split" else cache


def main() -> None:
    """Build what is missing in the user's cache, and copy it."""
    process.die_with_parent()
    from hybrid_moe_kernels.extension import default_cache
    from hybrid_moe_kernels.gated_delta_rule.jit import PREFILL
    from hybrid_moe_kernels.moe.jit import EXPERTS

    from hybrid_moe_ref.engine.builds import BuildPlace, ensure
    from hybrid_moe_ref.parallel.observer import NullObserver

    run_dir = RunDir(Path(sys.argv[1]))
    settings = RunSettings.from_mapping(read_json(run_dir.config))
    kernels = folder(run_dir, settings) / "kernels"
    targets = [kernels]
    if settings.effective_kernel_cache == "split":
        targets = [of_rank(kernels, settings, rank) for rank in range(1, settings.num_ranks)]
    for extension in (PREFILL, EXPERTS):
        ensure(extension, BuildPlace(default_cache(), -1, NullObserver()))
        built = extension.folder(default_cache())
        for target in targets:
            shutil.copytree(built, target / built.name)  # with times, by which ninja knows what is up to date


if __name__ == "__main__":
    main()
