"""``python -m repro.lab.start.kernel_builder RUN_DIR``: fill the kernel cache of a run from the user's cache.

All runs of a user share the user's cache, so that each kernel is compiled only once.

This is a separate process because it needs torch, which the launcher never loads.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from repro.hosts.parent import die_with_parent
from repro.lab.settings import read_settings
from repro.lab.start.kernel_cache import folder, of_rank
from repro.store.run_dir import RunDir


def main() -> None:
    """Build the kernels that are missing in the user's cache, and copy all kernels into the run's cache."""
    die_with_parent()
    from hybrid_moe_kernels.extension import default_cache
    from hybrid_moe_kernels.lab.gdn_prefill import PREFILL, PREFILL_CUDA
    from hybrid_moe_kernels.lab.moe_experts import EXPERTS

    from hybrid_moe_ref.engine.startup.builds import BuildPlace, ensure
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
            # This copies the modification times, by which ninja knows what is up to date. With engine.cache_dir the
            # folder may already contain the kernels of an earlier run.
            shutil.copytree(built, target / built.name, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
