"""Judge a recorded program (`hmr record`, the vLLM plug-in) from its run directory: while it runs, or later."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from repro.attach.record.attendant import REQUEST
from repro.attach.record.rank import DEVICE_GROUPS
from repro.attach.vllm.qualified import at_exit, qualified
from repro.hosts.host import Host
from repro.hosts.options import WatchOptions
from repro.ingest.read import read
from repro.store.description import read_description
from repro.store.run_dir import RunDir
from repro.trace.witness.file import Tail
from repro.verdict import Verdict
from repro.verdict.partial import diagnose
from repro.verdict.rules.explain import NOT_ENOUGH
from repro.watch.comparison import Comparison
from repro.watch.document import Document, Durations, Watcher, describe
from repro.watch.live import Watch
from repro.watch.offline import judge_files

ANSWER_PATIENCE_S = 2.0
"""How many seconds the watcher waits until the ranks have written the evidence that it requested.

The background thread of a rank looks for requests every 0.2 s, or later if the main thread holds the interpreter's
lock.
"""


class DeviceGroups(Collection[str]):
    """The names of those process groups of a recorded job whose collectives are queued on a device.

    The ranks write these names into a file while they run, so each use of this collection reads the file again.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.root / DEVICE_GROUPS

    def _names(self) -> list[str]:
        try:
            return self._path.read_text().splitlines()
        except OSError:
            return []

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


class RecordedHost(Host):
    """The host of a recorded program's ranks, from which the watcher requests evidence by touching a file.

    In a run of the lab, the watcher sends signals to the ranks instead. It does not do so here, because a user's
    program can need these signals itself.
    """

    def collect(self, run_dir: RunDir, pids: Mapping[int, int]) -> dict[int, str]:
        """Request stacks and Flight Recorder dumps from the ranks, and wait at most ANSWER_PATIENCE_S seconds for them.

        pids: a dict from rank to process id

        Returns a dict from each rank whose stack or dump is missing to the end of the sentence "rank 1 left no …", such
        as "stack and no Flight Recorder dump".
        """
        files = {rank: (run_dir.stack(rank), run_dir.flight_recorder(rank)) for rank in pids}
        before = {path: _stamp(path) for paths in files.values() for path in paths}
        request = run_dir.root / REQUEST
        request.touch()
        os.utime(request)
        deadline = time.monotonic() + ANSWER_PATIENCE_S
        while any(_stamp(path) == stamp for path, stamp in before.items()) and time.monotonic() < deadline:
            time.sleep(0.05)
        names = ("stack", "Flight Recorder dump")
        missing = {
            rank: " and no ".join(name for name, path in zip(names, paths, strict=True) if _stamp(path) == before[path])
            for rank, paths in files.items()
        }
        return {rank: what for rank, what in missing.items() if what}


def _stamp(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0


def is_recording(run_dir: RunDir) -> bool:
    """Whether a run directory is the recording of a user's program, and not a run of the lab."""
    return run_dir.description.is_file() and not run_dir.config.exists() and (run_dir.root / "events").is_dir()


def options(run_dir: RunDir) -> WatchOptions:
    """Return the watcher's settings for a recorded job, such as the quiet window, from the job's run.json.

    Raises OSError or DamagedFile.
    """
    description = read_description(run_dir.description)
    return WatchOptions(
        description.num_ranks, description.quiet_window_s, description.deadline_s, DeviceGroups(run_dir)
    )


def watch_of(
    run_dir: RunDir,
    job_alive: Callable[[], bool],
    interrupted: Callable[[], bool],
    show: Callable[[list[Tail]], None],
    notice: Callable[[str], None],
) -> Watch:
    """Return the watcher of a recorded job. Its method ``run`` follows the job until there is a verdict.

    job_alive    returns whether the job still runs
    interrupted  returns whether the watcher must end
    show         is called several times a second with the readers of the ranks' witnesses, to display the progress
    notice       prints a line, for example about the waits between ranks
    """
    return Watch(
        run_dir,
        options(run_dir),
        job_alive=job_alive,
        interrupted=interrupted,
        describe=lambda verdict: _describe(run_dir, verdict),
        show=show,
        notice=notice,
        remark=at_exit,
        host=RecordedHost(),
    )


def judge_again(run_dir: RunDir) -> tuple[Document, bool]:
    """Judge a recorded job from its files. Returns the content of verdict.json, and whether all files could be read."""
    again = judge_files(run_dir, options(run_dir), Comparison())
    decided = again.decided
    document = _describe(
        run_dir,
        again.verdict,
        watcher=Watcher.of(again.look),
        system=again.look.facts,
        interrupted=decided is not None and decided.interrupted,
        ended_by=decided.ended_by if decided else "",
        seconds=decided.seconds if decided else Durations(round(again.verdict.quiet_s, 3)),
    )
    return document, again.whole


def verdict_of(run_dir: RunDir) -> Verdict:
    """Return the verdict on a recorded job, from the job's files."""
    return _explained(run_dir, judge_files(run_dir, options(run_dir), Comparison()).verdict)


def _explained(run_dir: RunDir, verdict: Verdict) -> Verdict:
    """Add to the verdict on the witnesses what dumps, stacks and vLLM's engines show.

    The witnesses alone seldom name a culprit, because a user's program declares no schedule.
    """
    return qualified(_with_culprits(run_dir, verdict), run_dir.root)


def _with_culprits(run_dir: RunDir, verdict: Verdict) -> Verdict:
    """If the witnesses show a deadlock but no culprit, add the culprits that dumps and stacks show.

    The judge of witnesses compares each rank with the rank's declared schedule, and a user's program declares none. The
    judge of dumps can also compare each rank with the rank's own earlier steps.
    """
    if verdict.verdict != "deadlock" or verdict.culprits:
        return verdict
    diagnosis = diagnose(read([run_dir.root / "fr", run_dir.root / "stacks"]).records)
    if diagnosis.verdict != verdict.verdict or verdict.cause not in ("", diagnosis.cause) or not diagnosis.culprits:
        return verdict
    return replace(
        verdict,
        cause=diagnosis.cause,
        culprits=diagnosis.culprits,
        confidence=diagnosis.confidence,
        evidence=(*(line for line in verdict.evidence if line != NOT_ENOUGH), *diagnosis.evidence),
    )


def _describe(run_dir: RunDir, verdict: Verdict, **entries: Any) -> Document:
    description = read_description(run_dir.description)
    verdict = _explained(run_dir, verdict)
    return describe(verdict, scenario=description.title, num_ranks=description.num_ranks, **entries)
