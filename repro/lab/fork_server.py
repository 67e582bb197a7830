"""Eight ranks in half a second: one process imports torch and forks them, where torchrun starts eight interpreters.

``python -m repro.lab.fork_server`` is started by the launcher in place of torchrun, once for all the runs of a
command. It reads a line for each run, forks a job, and answers with the job's pid; the job forks the ranks, each the
same worker with the same files. All is forked before any thread exists. The ranks end with their job, the job with
this process, and this one with the launcher.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repro.hosts.parent import die_with_parent
from repro.lab import worker
from repro.lab.settings import read_settings
from repro.store.run_dir import RunDir


def main() -> int:
    """Entry point: 0 when the launcher has no more runs."""
    die_with_parent()
    import torch

    import hybrid_moe_ref.engine.lifecycle
    import hybrid_moe_ref.parallel.comm  # noqa: F401 - imported once here, not once in every rank

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a rank would write to, and so copy, the pages that all share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a job's watcher asks the system for it; nobody reaps it
    for line in sys.stdin.buffer:
        wanted = json.loads(line)
        pid = _fork(functools.partial(_job, wanted))
        print(pid, flush=True)
    return 0


def _job(wanted: dict[str, Any]) -> None:
    """All ranks of one run, from the first to the last that ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.environ.update(wanted["environment"])
    tempfile.tempdir = None  # of this run, as its TMPDIR says
    run_dir = RunDir(Path(wanted["run_dir"]))
    log = os.open(run_dir.launcher_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, replaced in enumerate((nothing, log, log)):
        os.dup2(replaced, number)
    num_ranks = read_settings(run_dir.config).num_ranks
    pids = [_fork(functools.partial(worker.run_launched, run_dir, rank)) for rank in range(num_ranks)]
    for pid in pids:
        os.waitpid(pid, 0)


def _fork(work: Callable[[], None]) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    die_with_parent(parent)
    try:
        work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
