"""The compiled kernels that a run finds when it starts: none, all, or all but rank 0's.

A run has a cache of its own, in its directory. A warm one is copied from the user's, where a process of its own first
builds what is missing: ``python -m repro.lab.kernel_cache RUN_DIR``.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hybrid_moe_kernels.extension import BUILT

from repro.hosts.parent import die_with_parent
from repro.lab.settings import RunSettings, read_settings
from repro.store.run_dir import RunDir

POLL_S = 0.1


class CannotFill(RuntimeError):
    """The run cannot find in its cache what it is to find there; the text says why."""


def folder(run_dir: RunDir, settings: RunSettings) -> Path:
    """The folder that the run's server keeps things in."""
    return Path(settings.engine.cache_dir or run_dir.cache)


def fill(run_dir: RunDir, settings: RunSettings, interrupt: Callable[[], bool]) -> None:
    """Put into the run's cache what it is to find there, within the run's deadline.

    Raises CannotFill: for want of a compiler for one, for a cold start in a user's folder that is filled, or for a
    folder that torch.compile cannot have: it names its files to the compiler without quotes. KeyboardInterrupt when
    the user wants no more.
    """
    for place in (run_dir.root, folder(run_dir, settings)) if settings.engine.compile else ():
        if re.search(r"[\s'\"\\]", str(place)):
            raise CannotFill(
                f"torch.compile cannot work in {place}, for the space or quote in it; choose another --out"
            )
    if not settings.engine.compiles_kernels:
        return
    kernels = folder(run_dir, settings) / "kernels"
    to_be_cold = of_rank(kernels, settings, 0)
    if settings.effective_kernel_cache != "warm" and any(to_be_cold.glob(f"*/{BUILT}")):
        raise CannotFill(f"no cold start: {to_be_cold} holds compiled kernels; empty it, or use --kernel-cache warm")
    if settings.effective_kernel_cache == "cold":
        return
    command = [sys.executable, "-m", "repro.lab.kernel_cache", str(run_dir.root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as builder:
        until = time.monotonic() + settings.deadline_s
        output = None
        try:
            while output is None:
                if interrupt():
                    raise KeyboardInterrupt
                if time.monotonic() > until:
                    raise CannotFill(f"no warm kernel cache: not built within {settings.deadline_s:g} s (--deadline)")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, output = builder.communicate(timeout=POLL_S)
        finally:
            builder.kill()  # its compilers end with it
    if builder.returncode:
        reason = output.strip().splitlines()[-1:] or ["no reason given"]
        raise CannotFill(f"no warm kernel cache: {reason[0]}")


def of_rank(cache: Path, settings: RunSettings, rank: int) -> Path:
    """Where a rank looks for compiled kernels."""
    return cache / f"rank{rank:03d}" if settings.effective_kernel_cache == "split" else cache


def main() -> None:
    """Build what is missing in the user's cache, and copy it."""
    die_with_parent()
    from hybrid_moe_kernels.extension import default_cache
    from hybrid_moe_kernels.gated_delta_rule.jit import PREFILL, PREFILL_CUDA
    from hybrid_moe_kernels.moe.jit import EXPERTS

    from hybrid_moe_ref.engine.builds import BuildPlace, ensure
    from hybrid_moe_ref.parallel.observer import NullObserver

    run_dir = RunDir(Path(sys.argv[1]))
    settings = read_settings(run_dir.config)
    kernels = folder(run_dir, settings) / "kernels"
    targets = [kernels]
    if settings.effective_kernel_cache == "split":
        targets = [of_rank(kernels, settings, rank) for rank in range(1, settings.num_ranks)]
    for extension in (PREFILL_CUDA,) if settings.backend == "nccl" else (PREFILL, EXPERTS):
        ensure(extension, BuildPlace(default_cache(), -1, NullObserver()))
        built = extension.folder(default_cache())
        for target in targets:
            # With times, by which ninja knows what is up to date. A user's folder may have it from the run before.
            shutil.copytree(built, target / built.name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
