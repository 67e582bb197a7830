"""Judge waits in a collective that some members have not queued, if the waits form no cycle."""

from __future__ import annotations

from collections.abc import Sequence

from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.waits import Wait
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import WORKING, call_in, ranks_of, verb


def judge_absence(job: JobRecords, waits: Sequence[Wait]) -> Diagnosis | None:
    """Judge waits in a collective that some members have not queued.

    Members that wait themselves are left out, unless all of them wait. The verdict is `slow` if the stacks show that
    all remaining members work; otherwise it is `inconclusive`. Return None if every member has queued each collective
    in which a rank waits.

    waits   the unfinished collectives of all ranks, each with the members that have not queued it
    """
    lacking = [wait for wait in waits if wait.missing]
    if not lacking:
        return None
    waiting_ranks = {wait.rank for wait in waits}
    ends = sorted({rank for wait in lacking for rank in wait.missing if rank not in waiting_ranks}) or sorted(
        {r for w in lacking for r in w.missing}
    )
    stacks = {rank: rows[-1] for rank, rows in job.main_stacks().items()}
    first = lacking[0]
    seen = [rank for rank in ends if rank in stacks and stacks[rank].activity]
    evidence = []
    for wait in lacking[:4]:
        evidence.append(
            f"Rank {wait.rank} waits in {call_in(wait.call, wait.group)} ({wait.at}); "
            f"{ranks_of(wait.missing)} {verb(wait.missing, 'has', 'have')} never queued it"
        )
    evidence += _ras_agrees(job, ends)
    for rank in seen:
        evidence.append(f"Rank {rank} is {_doing(stacks[rank].activity, stacks[rank].detail)} ({stacks[rank].source})")
    summary = (
        f"{ranks_of(ends).capitalize()} {verb(ends, 'has', 'have')} not queued "
        f"{call_in(first.call, first.group)}, in which {ranks_of({w.rank for w in lacking})} "
        f"{verb({w.rank for w in lacking}, 'waits', 'wait')}."
    )
    if seen == ends and all(stacks[rank].activity in WORKING for rank in ends):
        return Diagnosis(
            "slow", "", tuple(ends), (), "likely", (summary,), tuple(evidence),
            ("Stacks taken twice, in which the same frames stand still and no child process uses a processor.",),
            (COLLECT["children"], COLLECT["stacks"]),
        )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), tuple(ends), "undecided",
        (summary, f"These files do not show what {verb(ends, 'that rank does', 'those ranks do')} instead: "
                  f"{verb(ends, 'it', 'they')} may build, wait for something that no recorder sees, or have skipped "
                  "the call."),
        tuple(evidence),
        (f"A later dump in which {ranks_of(ends)} {verb(ends, 'has', 'have')} queued the operation.",),
        (f"stacks of {ranks_of(ends)}, twice: py-spy dump --nonblocking --pid PID",
         "a second set of dumps of all ranks, some seconds later: it shows whether a rank is slow or has skipped "
         "the call"),
    )  # fmt: skip


def _doing(activity: str, detail: str) -> str:
    words = {
        "building": "building",
        "compiling": "compiling",
        "lock": "waiting for",
        "collective": "in the collective",
        "device": "waiting for the device:",
        "idle": "idle:",
        "answer": "waiting:",
        "data": "in",
        "loading": "loading",
        "saving": "saving",
        "debugger": "in",
        "queue": "waiting in",
        "exit": "waiting for",
        "sleep": "in",
    }
    return f"{words.get(activity, activity)} {detail}".strip()


def _ras_agrees(job: JobRecords, ranks: Sequence[int]) -> list[str]:
    lines = []
    for answer in job.ras:
        for communicator in answer.communicators:
            for op, counts in communicator.launched.items():
                if len(counts) > 1 and {rank for rank, n in counts.items() if n < max(counts.values())} == set(ranks):
                    listed = ", ".join(f"rank {rank} {n}" for rank, n in sorted(counts.items()))
                    lines.append(
                        f"NCCL's RAS agrees: launches of {op} are {listed} ({answer.source}). RAS numbers each kind of "
                        "operation separately, so its numbers differ from those of the recorder."
                    )
    return lines
