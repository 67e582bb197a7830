"""Judge the evidence of other tools, which shows only part of what happened, and never a declared schedule.

RULES lists the rules; the rules that prove most come first. The first rule that returns a `Diagnosis` decides. A rule
that does not apply returns None.
"""

from __future__ import annotations

from collections.abc import Sequence

from repro.trace.foreign.records import Observation
from repro.verdict.partial.commands import with_pids
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.dumps.judge import judge_recorders
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.logs.counts import judge_counts
from repro.verdict.partial.logs.failures import judge_failures
from repro.verdict.partial.logs.launches import judge_launches
from repro.verdict.partial.logs.mismatches import judge_message_sizes, judge_mismatches
from repro.verdict.partial.logs.starts import judge_start
from repro.verdict.partial.logs.timeouts import judge_timeouts
from repro.verdict.partial.looks.collectives import judge_waiting_ranks
from repro.verdict.partial.looks.hosts import judge_hosts, judge_places_of_ranks
from repro.verdict.partial.looks.locks import judge_lock_files
from repro.verdict.partial.notes import judge_notes, with_notes
from repro.verdict.partial.stacks.judge import judge_stacks
from repro.verdict.partial.stacks.places import judge_places
from repro.verdict.partial.words import ranks_of

RULES = (
    judge_mismatches, judge_message_sizes, judge_start, judge_failures, judge_lock_files, judge_hosts, judge_recorders,
    judge_timeouts, judge_places, judge_waiting_ranks, judge_stacks, judge_counts, judge_launches,
    judge_places_of_ranks, judge_notes,
)  # fmt: skip

__all__ = ["Diagnosis", "diagnose"]


def diagnose(records: Sequence[Observation]) -> Diagnosis:
    """Return what the records of a job prove, and what to collect next. No rank is named as culprit without proof.

    records   what the readers of evidence found in the job's dumps, stacks, logs and other files
    """
    job = JobRecords.of(records)
    for rule in RULES:
        diagnosis = rule(job)
        if diagnosis is not None:
            return with_pids(with_notes(diagnosis, job), job)
    return with_pids(with_notes(_nothing_said(job), job), job)


def _nothing_said(job: JobRecords) -> Diagnosis:
    if not job.recorders:
        return Diagnosis.inconclusive("No line of the files says where a rank is.")
    ranks = ranks_of(job.recorders)
    return Diagnosis.inconclusive(
        f"The dumps of {ranks} show no unfinished operation, and no file shows what the other ranks do."
    )
