"""End a run: write its evidence to the disk, let ranks that are done exit, and kill every process that is left."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hybrid_moe_ref.files import sync
from repro.hosts import agent, processes
from repro.lab.start.job import Job
from repro.store.run_dir import RunDir

PERSIST_PATIENCE_S = 5.0
"""Seconds to wait for the evidence to be written to the disk."""

SYNCS = 8
"""Number of files that are written to the disk at the same time. One after another would take ten times as long."""

RELEASE_PATIENCE_S = 8.0
"""Seconds to wait for ranks that are done to exit by themselves."""


def persist(run_dir: RunDir, notice: Callable[[str], None], patience_s: float = PERSIST_PATIENCE_S) -> None:
    """Write the evidence from the page cache to the disk (fsync), because people often reset a machine that hangs.

    Daemon threads do this work, and this function returns after ``patience_s`` at the latest. So a file server that
    does not answer cannot keep the ranks alive.

    notice: called with a text if a file could not be written
    """
    paths, failures = run_dir.contents(), []

    def sync_all(share: list[Path]) -> None:
        for path in share:
            try:
                sync(path)
            except OSError as error:
                failures.append(f"{path}: {error.strerror or error}")

    shares = [paths[first::SYNCS] for first in range(SYNCS)]
    threads = [threading.Thread(target=sync_all, args=(share,), daemon=True) for share in shares]
    until = time.monotonic() + patience_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        failures.append(f"{run_dir.root} was not written to its disk within {patience_s:g} s")
    for failure in failures[:1]:
        notice(f"evidence is perhaps lost if this machine is reset now: {failure}")


def end(run_dir: RunDir, started: list[Job], ranks: list[processes.Process]) -> list[str]:
    """Kill the jobs ``started`` with their descendants, and the ``ranks``. Then remove the run's temporary files.

    Returns a sentence for each process that did not end within processes.REAP_PATIENCE_S.
    """
    # The pid of a job that has ended may already belong to another process.
    running = [child for child in started if child.poll() is None]
    descendants = [process for child in running for process in processes.with_descendants(child.pid)]
    left = processes.kill([*ranks, *descendants])
    for child in started:  # reaps the children of this process, so that none stays a zombie
        child.poll()
    agent.remove_temporary_files(run_dir, (run_dir.store, run_dir.interrupted, run_dir.root / "rendezvous"))
    shutil.rmtree(run_dir.root / "tmp", ignore_errors=True)
    return [f"{processes.describe(pid)} could not be ended: it does not return from a system call" for pid in left]


def release(run_dir: RunDir, job_alive: Callable[[], bool]) -> None:
    """Let the ranks exit by themselves. They have done their work and wait in `repro.lab.rank.worker.park`.

    Returns when ``job_alive`` returns False, or after RELEASE_PATIENCE_S.
    """
    run_dir.release.touch()
    deadline = time.monotonic() + RELEASE_PATIENCE_S
    while job_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    run_dir.release.unlink(missing_ok=True)
