"""Eight ranks in half a second: one process imports torch and forks them, where torchrun starts eight interpreters.

``python -m repro.forked RUN_DIR`` is started by the launcher in place of torchrun. Each rank is the same worker with
the same files. The ranks are forked before any thread exists, and end with this process, as this one does with the
launcher.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

from repro import process, worker
from repro.rundir import RunDir, read_json
from repro.settings import RunSettings


def main() -> int:
    """Entry point: 0 when all ranks ended by themselves, else 1, as torchrun."""
    process.die_with_parent()
    run_dir = RunDir(Path(sys.argv[1]))
    num_ranks = RunSettings.from_mapping(read_json(run_dir.config)).num_ranks
    import torch

    import hybrid_moe_ref.engine.lifecycle
    import hybrid_moe_ref.parallel.comm  # noqa: F401 - imported once here, not once in every rank

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a rank would write to, and so copy, the pages that all ranks share
    pids = [_fork(run_dir, rank) for rank in range(num_ranks)]
    return int(any(os.waitpid(pid, 0)[1] for pid in pids))


def _fork(run_dir: RunDir, rank: int) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    process.die_with_parent(parent)
    try:
        worker.run_launched(run_dir, rank)
    finally:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
