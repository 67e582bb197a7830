"""Prepare the kernel cache of a run before ranks start: empty (cold), full (warm), or empty only for rank 0 (split).

Each run has its own cache in its run directory. All runs of a user also share another cache, the user's cache. To fill
the cache of a run, `kernel_builder.py` first builds the kernels that are missing in the user's cache, and then copies
the kernels from there.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hybrid_moe_kernels.extension import BUILT

from repro.lab.settings import RunSettings
from repro.store.run_dir import RunDir

POLL_S = 0.1


class CannotFill(RuntimeError):
    """The kernel cache of a run cannot be prepared as the settings ask. The text gives the reason."""


def folder(run_dir: RunDir, settings: RunSettings) -> Path:
    """Return the folder of the server's caches: ``engine.cache_dir``, or if this is empty, a folder of the run."""
    return Path(settings.engine.cache_dir or run_dir.cache)


def fill(run_dir: RunDir, settings: RunSettings, interrupt: Callable[[], bool]) -> None:
    """Bring the run's kernel cache into the state that the settings ask for, within the run's deadline.

    Raises CannotFill in three cases:

    - The kernels cannot be built, for example without a compiler, or not within the deadline.
    - The settings ask for a cold start, but the folder ``engine.cache_dir`` contains compiled kernels.
    - torch.compile cannot use the folder, because its path contains a space, quote or backslash.

    interrupt: returns whether the user has interrupted; then this function raises KeyboardInterrupt
    """
    for place in (run_dir.root, folder(run_dir, settings)) if settings.engine.compile else ():
        if re.search(r"[\s'\"\\]", str(place)):
            raise CannotFill(
                f"torch.compile cannot work in {place}, because the path contains a space, quote or backslash; choose "
                "another folder with --out"
            )
    if not settings.engine.compiles_kernels:
        return
    kernels = folder(run_dir, settings) / "kernels"
    to_be_cold = of_rank(kernels, settings, 0)
    if settings.effective_kernel_cache != "warm" and any(to_be_cold.glob(f"*/{BUILT}")):
        raise CannotFill(
            f"a cold start is not possible, because {to_be_cold} contains compiled kernels; empty the folder, or use "
            "--kernel-cache warm"
        )
    if settings.effective_kernel_cache == "cold":
        return
    command = [sys.executable, "-m", "repro.lab.start.kernel_builder", str(run_dir.root)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as builder:
        until = time.monotonic() + settings.deadline_s
        output = None
        try:
            while output is None:
                if interrupt():
                    raise KeyboardInterrupt
                if time.monotonic() > until:
                    raise CannotFill(
                        f"cannot fill the kernel cache: the kernels were not built within {settings.deadline_s:g} "
                        "s; choose a larger --deadline"
                    )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _, output = builder.communicate(timeout=POLL_S)
        finally:
            builder.kill()  # the compilers that the builder started end with it
    if builder.returncode:
        reason = output.strip().splitlines()[-1:] or ["the process that builds the kernels gave no reason"]
        raise CannotFill(f"cannot fill the kernel cache: {reason[0]}")


def of_rank(cache: Path, settings: RunSettings, rank: int) -> Path:
    """Return where a rank finds compiled kernels: in ``cache``, or in its own folder there if the cache is split."""
    return cache / f"rank{rank:03d}" if settings.effective_kernel_cache == "split" else cache
