"""Judge Flight Recorder dumps: which ranks wait for which, in which operation, and whether the waits form a cycle.

On NCCL, the dumps show which operations the host queued. They do not show what the device is doing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from repro.trace.knowledge import Knows
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.absences import judge_absence
from repro.verdict.partial.dumps.advances import judge_advance
from repro.verdict.partial.dumps.conflicts import stacks_against_dumps
from repro.verdict.partial.dumps.cycles import judge_cycle
from repro.verdict.partial.dumps.members import groups_of, lists_members
from repro.verdict.partial.dumps.sides import different_arguments
from repro.verdict.partial.dumps.stopped import judge_stopped
from repro.verdict.partial.dumps.waits import Wait, waits_of
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.stacks.locks import judge_lock_across
from repro.verdict.partial.stacks.processes import judge_processes
from repro.verdict.partial.words import call_in, ranks_of, verb


def judge_recorders(job: JobRecords) -> Diagnosis | None:
    if not job.recorders:
        return _none_usable(job)
    if len(job.ranks_by_world_size) > 1:
        return _several_jobs(job)
    groups = groups_of(job.recorders)
    waits = waits_of(groups, job.recorders)
    diagnosis = (
        different_arguments(job, groups)
        or judge_stopped(job, groups)
        or judge_cycle(job, waits)
        or judge_advance(job, waits)
        or judge_lock_across(job, waits)
        or _processes(job, waits)
        or judge_absence(job, waits)
        or _all_there(job, waits)
        or _nothing_pending(job)
    )
    if diagnosis is None:
        return None
    notes = (*diagnosis.notes, *job.contradictions, *stacks_against_dumps(job))
    return replace(diagnosis, notes=notes, waits=tuple(_wait_rows(waits)))


def _processes(job: JobRecords, waits: Sequence[Wait]) -> Diagnosis | None:
    return judge_processes(job) if any(wait.missing for wait in waits) else None


def _none_usable(job: JobRecords) -> Diagnosis | None:
    if not job.contradictions or job.timeouts or job.stacks or job.ras:
        return None
    return replace(
        Diagnosis.inconclusive("No recorder dump is usable.", collect=("recorder", "stacks")),
        notes=tuple(job.contradictions),
    )


def _several_jobs(job: JobRecords) -> Diagnosis:
    jobs = "; ".join(
        f"{size} ranks: dumps of {ranks_of(ranks)}" for size, ranks in sorted(job.ranks_by_world_size.items())
    )
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (f"The dumps are of {len(job.ranks_by_world_size)} jobs, because their world sizes differ ({jobs}).",), (), (),
        ("the files of one job, in a folder with no others: python -m repro diagnose FOLDER",),
    )  # fmt: skip


def _all_there(job: JobRecords, waits: Sequence[Wait]) -> Diagnosis | None:
    """Judge waits in an operation that every member with a dump has queued.

    The verdict is `stall` if all members are known and each has a dump with the arguments; otherwise it is
    `inconclusive`. Return None if no rank waits.
    """
    if not waits:
        return None
    first = min(waits, key=lambda wait: wait.call.at_s or 0.0)
    ranks = sorted({wait.rank for wait in waits})
    unseen = sorted({rank for wait in waits for rank in wait.unseen})
    evidence = [f"Rank {wait.rank} waits in {call_in(wait.call, wait.group)} ({wait.at})" for wait in waits[:8]]
    there = f"{ranks_of(ranks).capitalize()} {verb(ranks, 'waits', 'wait')} in {call_in(first.call, first.group)}."
    if unseen:
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (f"{there} There are no usable dumps of {ranks_of(unseen)}, so a rank may be absent.",),
            tuple(evidence), (), (f"the dumps of {ranks_of(unseen)}, taken at the same time as the others",
                                  COLLECT["stacks"]),
        )  # fmt: skip
    if not lists_members(job.recorders, first.group) and not _is_whole_world(job, ranks):
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (f"{there} These dumps do not list the members of {first.group}, so a member may be missing.",),
            tuple(evidence), (), ("the dumps of all ranks of the job, and its world size (the launcher's command)",
                                  COLLECT["stacks"]),
        )  # fmt: skip
    if blind := [rank for rank in ranks if Knows.ARGUMENTS not in job.recorders[rank].knows]:
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (f"{there} The dumps of {ranks_of(blind)} do not show the sizes and types of this operation.",),
            tuple(evidence), (), (COLLECT["stacks"], "a second set of dumps, some seconds later"),
        )  # fmt: skip
    return Diagnosis(
        "stall", "", (), (), "likely",
        (f"All members have queued {call_in(first.call, first.group)} with equal arguments, and the operation has not "
         "ended. No rank is absent in these dumps.",),
        tuple(evidence),
        ("A later dump in which the operation has ended: then it was slow, and did not hang.",),
        (COLLECT["kernel"], COLLECT["nccl"], "a second set of dumps, some seconds later"),
    )  # fmt: skip


def _is_whole_world(job: JobRecords, ranks: Sequence[int]) -> bool:
    size = job.world_size()
    return size is not None and list(ranks) == list(range(size))


def _nothing_pending(job: JobRecords) -> Diagnosis | None:
    if len(job.recorders) < 2 or job.timeouts or job.stacks or job.ras or job.failures:
        return None
    members = {rank for dump in job.recorders.values() for group in dump.configured for rank in group.members}
    if members - job.recorders.keys():
        return None
    whole = bool(members) or _is_whole_world(job, list(job.recorders))
    if not whole and list(job.recorders) != list(range(len(job.recorders))):
        return None  # the numbers of the ranks have gaps, so a rank has no dump
    if any(Knows.ARGUMENTS not in dump.knows for dump in job.recorders.values()):
        return None  # ranks may have completed operations with different arguments
    return Diagnosis(
        "clean", "", (), (), "likely" if whole else "undecided",
        (f"No operation is unfinished in the dumps of {ranks_of(job.recorders)}.",), (),
        ("Operations that the recorder does not see: pynccl, CUDA graphs, gloo transfers, or a rank without a dump.",),
        (COLLECT["stacks"],),
    )  # fmt: skip


def _wait_rows(waits: Sequence[Wait]) -> list[dict[str, object]]:
    return [
        {"ranks": [wait.rank], "waits_in": call_in(wait.call, wait.group), "for": list(wait.missing), "source": wait.at}
        for wait in waits
    ]
