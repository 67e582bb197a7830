"""Fork the ranks of a run from one process that has imported torch. Eight ranks start in half a second.

The launcher starts ``python -m repro.lab.start.fork_server`` instead of torchrun, once for all runs of a command. For
each run this fork server reads one JSON line, forks a process (the "job") and prints the job's pid. The job forks the
ranks. Each rank runs the same code and writes the same files as under torchrun. The server and the job fork only while
they have a single thread. If the job ends, its ranks are killed; if the server ends, its jobs are killed; if the
launcher ends, the server is killed.
"""

from __future__ import annotations

import contextlib
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

from repro.hosts.parent import die_with_parent
from repro.lab.rank import worker
from repro.lab.settings import read_settings
from repro.store.run_dir import RunDir


def main() -> int:
    """Fork a job for each run that the launcher asks for, until the launcher closes the pipe; return 0."""
    die_with_parent()
    gc.disable()  # until all is imported: what modules define is no garbage
    import torch

    import hybrid_moe_ref.engine.lifecycle
    import hybrid_moe_ref.parallel.comm  # noqa: F401 - one import here instead of one in every rank

    torch.set_num_threads(1)
    # The ranks inherit this policy. With the usual one, each message of gloo interrupts the process that sends it: if
    # there are more ranks than processors, an all-gather takes twice the processor time.
    with contextlib.suppress(OSError):  # a sandbox may refuse it; the ranks are only slower then
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    gc.freeze()  # a garbage collection in a rank would write to the shared pages, and so copy them
    gc.enable()
    signal.signal(
        signal.SIGCHLD, signal.SIG_IGN
    )  # avoids zombies: no process reaps the job, and the watcher looks for it in /proc
    for line in sys.stdin.buffer:
        request = json.loads(line)
        run_dir = RunDir(Path(request["run_dir"]))
        settings = read_settings(run_dir.config)
        if settings.engine.compile:
            _import_compiler()
        pid = _fork(functools.partial(_job, run_dir, settings.num_ranks, request["environment"]))
        print(pid, flush=True)
    return 0


def _import_compiler() -> None:
    """Import torch.compile's compiler once, because in every rank the import would take two seconds of CPU time."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # otherwise the import starts processes and a thread
    import torch._inductor.compile_fx

    gc.freeze()


def _job(run_dir: RunDir, num_ranks: int, environment: dict[str, str]) -> None:
    """Fork the ranks of one run and wait for all of them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.environ.update(environment)
    tempfile.tempdir = None  # makes tempfile read TMPDIR again, which is now this run's
    log = os.open(run_dir.launcher_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, target in enumerate((null, log, log)):
        os.dup2(target, descriptor)
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
