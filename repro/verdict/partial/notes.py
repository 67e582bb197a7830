"""Explain log lines that prove little but are often misunderstood, such as heartbeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repro.trace.foreign.records import Note
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords

KNOWN_BAD_NCCL = {
    "2.28.9": "NCCL 2.28.9 deadlocks on aarch64 (nccl#2353, fixed in 2.29.3).",
    "2.29.2": "NCCL 2.29.2 deadlocks on aarch64 (nccl#2353, fixed in 2.29.3).",
}


_LOOKED = {"numbered": "Rank numbers: ", "hidden": "Not seen: ", "warning": "Host: ", "gpu": "Host: "}
"""Kinds of notes that `hmr collect` writes about a host -> the words with which the diagnosis introduces them."""

WAITS = ("deepep", "watchdog", "stuck", "barrier", "sizes", "network", "ras", "unreadable")
"""Kinds of notes about a wait, or about something that could not be observed. They never show the cause."""


def judge_notes(job: JobRecords) -> Diagnosis | None:
    beats = [note for note in job.notes if note.kind == "heartbeat"]
    if beats:
        return _heartbeats(job, beats)
    rows = [note for note in job.notes if note.kind in WAITS]
    if not rows:
        return None
    lines = dict.fromkeys(f"{note.process}: {note.text} ({note.source})" for note in rows)
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        ("These lines report waits and time-outs as one process saw them. No line says where the other ranks are.",),
        tuple(list(lines)[:8]), (), (COLLECT["stacks"], COLLECT["recorder"], COLLECT["kernel"]),
    )  # fmt: skip


def _heartbeats(job: JobRecords, beats: Sequence[Note]) -> Diagnosis:
    evidence = [
        f"{len(beats)} heartbeat lines of {beats[0].process}, the first at {beats[0].source}: this line is only "
        "information; servers that start slowly or are idle print it, too"
    ]
    if any(note.kind == "compiled" for note in job.notes):
        evidence.append(
            "The line about torch.compile is about one rank, because the engine prints it on one rank only. It does "
            "not show what the others do."
        )
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        ("A process still waits for a message of another process. The line is a heartbeat, not an error. No line in "
         "these files says where the workers are.",),
        tuple(evidence), (),
        (COLLECT["stacks"], "whether a compiler runs, and the caches that it writes: ps -ef | grep -E "
                            "'nvcc|cicc|ninja|ptxas'", COLLECT["recorder"]),
    )  # fmt: skip


def with_notes(diagnosis: Diagnosis, job: JobRecords) -> Diagnosis:
    """Add notes to a diagnosis: versions with known defects, what was not observed, and why lines can be missing."""
    notes = known_bad(job)
    if any(note.kind == "repeated" for note in job.notes):
        notes.append("Ray drops repeated lines of logs: a rank whose line is missing here may have printed it.")
    if any(note.kind == "stuck" for note in job.notes):
        notes.append("A watchdog thread was itself blocked: the log of that rank may lack a time-out.")
    seen = dict.fromkeys(f"{_LOOKED[note.kind]}{note.text}." for note in job.notes if note.kind in _LOOKED)
    notes += list(seen)[:6]
    return replace(diagnosis, notes=(*diagnosis.notes, *notes)) if notes else diagnosis


def versions_of(job: JobRecords) -> list[str]:
    """Return the versions of NCCL in the logs and dumps of the job."""
    named = {note.value for note in job.notes if note.kind == "version"}
    return sorted((named | {dump.library for dump in job.recorders.values()}) - {""})


def known_bad(job: JobRecords) -> list[str]:
    """Return a sentence for each version of NCCL in the job that has a known defect."""
    versions = versions_of(job)
    return [text for version, text in KNOWN_BAD_NCCL.items() if version in versions]
