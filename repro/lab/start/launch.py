"""Run one variant: create the run directory, start the ranks and the reference, watch the ranks, end every process.

When this process ends, for whatever reason, the operating system kills every process that was started here. Only the
run directory with its verdict stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hybrid_moe_ref.files import open_regular
from repro.hosts import locks, processes
from repro.hosts.interrupt import Interrupt
from repro.lab.outcome.expectation import document_of, watch_options
from repro.lab.outcome.tokens import compare_tokens
from repro.lab.settings import RunSettings
from repro.lab.start.ending import end, persist, release
from repro.lab.start.job import Job, Start, start_process
from repro.lab.start.prepare import prepare_run_dir
from repro.report.terminal import Display
from repro.store.run_dir import OutputError, RunDir, write_json
from repro.store.schema import to_json
from repro.verdict import Verdict
from repro.watch.document import Document, Durations
from repro.watch.failure import failed
from repro.watch.live import Watch


def run(
    settings: RunSettings,
    out: Path,
    interrupt: Interrupt,
    display: Display,
    start: Start,
    known_reference: Path | None = None,
) -> tuple[RunDir, Document]:
    """Run one variant to its verdict. Returns the run directory and the content of verdict.json.

    out: the folder in which the run directory is created
    interrupt: returns whether the user has interrupted
    display: shows the progress of the run
    start: starts the ranks; from :func:`repro.lab.start.job.launcher`
    known_reference: reference.json of an earlier run with the same ``reference_key``; None if there is none

    Raises KeyboardInterrupt if the user interrupts before the ranks start. After a later interrupt, the verdict says
    that the user interrupted.
    """
    run_dir = prepare_run_dir(out, settings, interrupt)
    with interrupt.deferred():
        if known_reference is not None and known_reference.exists():
            shutil.copyfile(known_reference, run_dir.reference)
        try:
            job = start(run_dir, settings, interrupt)
        except Exception as error:  # for example, no more processes or file descriptors
            end(run_dir, [], [])
            return run_dir, _undecided(run_dir, settings, error)

        def job_alive() -> bool:
            # The job may have ended because of the interrupt, which is no evidence about the run.
            return interrupt() or job.poll() is None

        return run_dir, attend(run_dir, settings, interrupt, display, job_alive, [job])


def skipped(settings: RunSettings, why: str) -> Document:
    """Return the content of verdict.json for a run that is not possible on this machine. ``why`` gives the reason.

    So a list or table of verdicts also has an entry for this run.
    """
    verdict = Verdict("inconclusive", evidence=(why,), confidence="undecided")
    return document_of(settings, verdict, matches_expected=False, skipped=why)


def attend(
    run_dir: RunDir,
    settings: RunSettings,
    interrupt: Callable[[], bool],
    display: Display,
    job_alive: Callable[[], bool],
    started: Sequence[Job] = (),
) -> Document:
    """Watch a started run until its verdict, then end the run. Returns the content of verdict.json.

    If reference.json does not exist, start the process that writes this file.

    interrupt   returns whether the user has interrupted
    display     shows the progress of the run
    job_alive   returns whether a process of the job still runs: the launcher of the ranks, or a rank
    started     the processes of this run that the calling process has started; they are ended with the run

    If this program itself fails, the verdict is `inconclusive`. Raises OutputError if another process already watches
    the run: only one process is allowed to end the run. Raises OSError, with the path of the run directory, if no
    verdict can be written.
    """
    with _only_one(run_dir):
        try:
            return _attend(run_dir, settings, interrupt, display, job_alive, list(started))
        except Exception as error:
            if run_dir.verdict.exists():  # the failure came after the verdict
                raise
            try:
                return _undecided(run_dir, settings, error)
            except OSError as full:
                reason = f"{full.strerror or full}; what is kept of the run is in {run_dir.root}"
                raise OSError(full.errno, reason, full.filename) from error


def _undecided(run_dir: RunDir, settings: RunSettings, error: Exception) -> Document:
    """Write an inconclusive verdict for a run that could not be started or watched, and the traceback into a log."""
    verdict = failed(run_dir, "repro itself", [error])
    total_s = round(max(0.0, time.time() - run_dir.config.stat().st_mtime), 3)
    document = document_of(settings, verdict, seconds=Durations(total=total_s))
    write_json(run_dir.verdict, to_json(document), durable=True)
    return document


@contextlib.contextmanager
def _only_one(run_dir: RunDir) -> Iterator[None]:
    """Hold a lock on config.json during the ``with`` block, so that only one process watches and ends the run.

    Raises OutputError if another process holds the lock. The operating system releases the lock if its holder crashes.
    """
    with open_regular(run_dir.config) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = locks.holder(run_dir.config.resolve())
            raise OutputError(
                f"{run_dir.root}: process {pid} watches this run to its end; leave out --end to judge the run as it is "
                "now"
            ) from None
        yield


def _attend(
    run_dir: RunDir,
    settings: RunSettings,
    interrupt: Callable[[], bool],
    display: Display,
    job_alive: Callable[[], bool],
    children: list[Job],
) -> Document:
    started_here = bool(children)
    reference: subprocess.Popen[bytes] | None = None
    ranks: Callable[[], list[processes.Process]] = list

    def reference_alive() -> bool:
        return reference is not None and reference.poll() is None

    try:
        if not run_dir.reference.exists():
            command = [sys.executable, "-m", "repro.lab.outcome.reference", str(run_dir.root)]
            reference = start_process(command, run_dir, run_dir.reference_log)
            children.append(reference)
        watch = Watch(
            run_dir,
            watch_options(settings),
            job_alive=job_alive,
            compare=lambda final: compare_tokens(run_dir, settings.num_ranks, settings.tp_size, reference_alive, final),
            describe=lambda verdict: document_of(settings, verdict),
            interrupted=lambda: interrupt() or run_dir.interrupted.exists(),
            show=display.show,
            notice=display.notice,
        )
        ranks = watch.processes
        document = watch.run()
        persist(run_dir, display.notice)
        # The ranks' results are on the disk, and eight interpreters take seconds to exit. So the ranks that this
        # process started are killed, except under NCCL, which must release resources of the host. Ranks of another
        # launcher exit by themselves, because that launcher reports ranks that do not exit with 0.
        if watch.all_done() and not (started_here and settings.backend == "gloo"):
            release(run_dir, lambda: job_alive() or watch.remote_ranks_run())
    finally:
        for text in end(run_dir, children, _living(ranks, display.notice)):
            display.notice(text)
    return document


def _living(ranks: Callable[[], list[processes.Process]], notice: Callable[[str], None]) -> list[processes.Process]:
    """Return the ranks that still run. If they cannot be listed, print a notice and return [].

    The ranks that this process started are ended even without this list, because they are descendants of its jobs.
    """
    try:
        return ranks()
    except Exception as error:
        notice(f"cannot list the ranks, so some ranks perhaps still run: {type(error).__name__}: {error}")
        return []
