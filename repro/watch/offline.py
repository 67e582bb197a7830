"""Judge a run from the files that it left. The files are untrusted: they may be damaged or forged."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from repro.hosts import locks
from repro.hosts.host import Host
from repro.hosts.options import WatchOptions
from repro.hosts.system import System
from repro.store.description import RunDescription
from repro.store.run_dir import RunDir
from repro.trace.witness.file import Witness, read_dir
from repro.trace.witness.rewind import rewind
from repro.verdict import Verdict
from repro.verdict.classes import class_of
from repro.watch.comparison import Comparison
from repro.watch.document import Document, read_document
from repro.watch.look import Look
from repro.watch.qualified import ended_from_outside, not_decided, uncompared

LOOK_S = 0.5


def options_of(description: RunDescription) -> WatchOptions:
    """Return the watcher's options for a run, from its run.json."""
    return WatchOptions(
        description.num_ranks, description.quiet_window_s, description.deadline_s, description.queued_groups
    )


@dataclass(frozen=True)
class Again:
    """The result of judging a run again from its files.

    look      what was judged: the witnesses of all ranks and the facts about their processes at one moment
    decided   the content of the verdict.json that the watcher wrote; None if the file is missing or damaged
    whole     False if verdict.json or a witness is damaged or incomplete, if a witness has changed since the verdict,
              or if the witnesses are not all of one run
    """

    verdict: Verdict
    look: Look
    decided: Document | None
    whole: bool


def judge_files(run_dir: RunDir, options: WatchOptions, comparison: Comparison) -> Again:
    """Judge a run from its files.

    If the run has a verdict.json, the judge gets the watcher's last look at the run: verdict.json has the time and the
    facts of this look. So the verdict is the same on any machine. If verdict.json is missing or damaged, this function
    observes the processes of the run for LOOK_S seconds, and judges their present state.

    comparison   the result of comparing the run's tokens with the reference
    """
    damaged: list[str] = []
    decided: Document | None = None
    if run_dir.verdict.exists():
        try:
            decided = read_document(run_dir.verdict)
        except (OSError, ValueError) as error:
            damaged.append(f"{run_dir.describe(error)}; the run is judged as if it had no verdict.json")
    look, refused = _look_at_decided(run_dir, decided) if decided else _look_now(run_dir)
    verdict = look.concluded(run_dir, options, comparison.wrong)
    if decided is None and look.none_began():
        verdict = verdict.with_evidence([_launcher_of(run_dir)])
    before = decided.verdict if decided else ""
    if verdict.verdict == "clean":
        if decided is not None and class_of(before).live:
            verdict = dataclasses.replace(
                verdict,
                verdict=before,
                culprits=decided.culprits,
                confidence=decided.confidence,
                evidence=decided.evidence,
            )
        elif comparison.missing and before != "clean":  # before a saved `clean`, the watcher has compared the tokens
            verdict = uncompared(verdict, comparison.missing)
        elif comparison.evidence:
            verdict = verdict.with_evidence([comparison.evidence])
    if decided and decided.interrupted:
        verdict = not_decided(verdict)
    if decided and decided.ended_by:
        verdict = ended_from_outside(verdict, decided.ended_by)
    runs = {witness.writer.run_id for witness in look.witnesses.values()}
    problems = any(witness.problems for witness in look.witnesses.values())
    whole = not refused and not damaged and len(runs) <= 1 and not problems
    lines = [line for line in map(run_dir.describe, refused) if line not in verdict.evidence]
    return Again(verdict.with_evidence([*lines, *damaged]), look, decided, whole)


def _look_at_decided(run_dir: RunDir, decided: Document) -> tuple[Look, list[str]]:
    """Return the watcher's last look at the run, and a line for each witness that no longer has the judged events.

    decided: the content of the run's verdict.json
    """
    witnesses, refused = read_dir(run_dir.root / "events")
    for rank in witnesses.keys() & decided.judged.keys():
        progress = decided.judged[rank]
        as_judged = rewind(witnesses[rank], progress.num_events, progress.heartbeat_ns)
        if as_judged is not None:
            witnesses[rank] = as_judged
        else:
            name = witnesses.pop(rank).name
            refused.append(
                f"{name}:0: does not hold the {progress.num_events} events that were judged: the file has "
                "changed since the verdict"
            )
    if (look := decided.look()) is not None:
        return dataclasses.replace(look, witnesses=witnesses), refused
    here = Host().here
    last_ns = max((w.last_event_ns() + here.clock_ahead_ns(w.writer) for w in witnesses.values() if w.last), default=0)
    now_ns = last_ns + int(decided.quiet_s * 1e9) + 1_000_000  # quiet_s is rounded to milliseconds
    return Look(here, now_ns, witnesses, decided.system), refused


def _look_now(run_dir: RunDir) -> tuple[Look, list[str]]:
    host = Host()
    system = System(LOOK_S, host)
    witnesses, _ = read_dir(run_dir.root / "events")
    system.look(witnesses, system.running(_writers(witnesses)))
    system.begin_measuring(_pids(system, witnesses))
    host.sleep(LOOK_S)
    system.measure(_pids(system, witnesses))
    now_ns = host.now_ns()
    running = system.running(_writers(witnesses))
    witnesses, refused = read_dir(run_dir.root / "events")
    return Look(host.here, now_ns, witnesses, system.look(witnesses, running)), refused


def _writers(witnesses: Mapping[int, Witness]) -> dict[int, Any]:
    return {rank: witness.writer for rank, witness in witnesses.items()}


def _pids(system: System, witnesses: Mapping[int, Witness]) -> dict[int, int]:
    return {rank: process.pid for rank, process in system.running(_writers(witnesses)).items() if process is not None}


def _launcher_of(run_dir: RunDir) -> str:
    """Describe a run of which no rank has begun: how long ago the run was prepared, and whether a process watches it.

    If a process watches the run, the ranks can still begin.
    """
    age_s = time.time() - run_dir.config.stat().st_mtime
    pid = locks.holder(run_dir.config.resolve())
    watched = (
        f"process {pid} watches it" if pid > 0 else "no process was found that watches it: its launcher may have ended"
    )
    return f"the run was prepared {age_s:.0f} s ago, and {watched}"
