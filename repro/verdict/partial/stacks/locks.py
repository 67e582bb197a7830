"""Judge a file lock for which ranks wait while no rank builds. The evidence is stacks, and dumps if there are any.

A stack does not show which process holds a lock. A rank is named as the holder only if no other rank can hold the
lock. So the stack of every rank must be known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro.trace.foreign.records import Stack
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.dumps.members import lists_members
from repro.verdict.partial.dumps.waits import Wait
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import WORKING, call_in, program_frames, ranks_of, verb

HOLDER = "which process holds the lock: cat /proc/locks; ls -l /proc/*/fd 2>/dev/null | grep -i lock"


def judge_lock_across(job: JobRecords, waits: Sequence[Wait]) -> Diagnosis | None:
    """Judge ranks that wait for a lock, while other ranks wait for these ranks in a collective.

    The stacks show the wait for the lock. The Flight Recorder dumps show the wait in the collective. Return None if no
    rank waits in a collective for a rank that waits for a lock. Also return None if a member of the group of such a
    collective has no stack, works, or does something unknown.
    """
    stacks = {rank: rows[-1] for rank, rows in job.main_stacks().items()}
    locked = sorted(rank for rank, stack in stacks.items() if stack.activity == "lock")
    blocked = [wait for wait in waits if set(wait.missing) & set(locked)]
    everybody = {rank for wait in blocked for rank in wait.group.members}
    if not blocked or not everybody <= stacks.keys():
        return None
    if any(stacks[rank].activity in (*WORKING, "") for rank in everybody):
        return None
    inside = sorted({wait.rank for wait in blocked})
    evidence = [
        f"Rank {wait.rank}: {call_in(wait.call, wait.group)} is not done ({wait.at}); "
        f"{ranks_of(wait.missing)} {verb(wait.missing, 'has', 'have')} not queued it"
        for wait in blocked
    ] + _lock_lines(stacks, locked)
    seen = lists_members(job.recorders, blocked[0].group) or everybody == set(range(job.world_size() or 0))
    return _across(locked, inside, call_in(blocked[0].call, blocked[0].group), stacks, evidence, seen)


def judge_locks(job: JobRecords, rows: Mapping[int, Sequence[Stack]]) -> Diagnosis | None:
    """Judge ranks that wait for a lock, by stacks alone. Return None if no rank waits for a lock.

    The caller has already judged jobs in which a rank builds. The holder of a lock may change, so a deadlock is
    reported only if each rank was seen twice at the same place.

    rows: for each rank the stacks of its main thread, oldest first
    """
    stacks = {rank: stack[-1] for rank, stack in rows.items()}
    locked = sorted(rank for rank, stack in stacks.items() if stack.activity == "lock")
    if not locked:
        return None
    inside = sorted(rank for rank, stack in stacks.items() if stack.activity == "collective")
    others = sorted(set(stacks) - set(locked) - set(inside))
    still = all(_stands_still(rows[rank]) for rank in (*locked, *inside))
    whole = still and not others and sorted(stacks) == list(range(job.world_size() or 0))
    evidence = _lock_lines(stacks, locked)
    if inside:
        evidence.append(
            f"{ranks_of(inside).capitalize()} {verb(inside, 'is', 'are')} in {stacks[inside[0]].detail}, at "
            f"{_place(stacks[inside[0]])} ({stacks[inside[0]].source})"
        )
    if inside and not others:
        return _across(locked, inside, stacks[inside[0]].detail, stacks, evidence, whole)
    if others:
        return _holder_elsewhere(
            locked,
            others,
            evidence,
            f"{ranks_of(others).capitalize()} may hold the lock: look at the stacks there.",
        )
    files = {stacks[rank].detail.partition(": ")[2] for rank in locked}
    if len(files) > 1 and "" not in files:
        return _two_locks(locked, sorted(files), evidence, whole and len(files) == 2)
    return _holder_elsewhere(
        locked, [],  evidence,
        "None of the ranks seen holds the lock. Either another process holds it, or the lock is a file that a killed "
        "process left behind (torch's FileBaton waits as long as the file exists).",
    )  # fmt: skip


def _across(
    locked: Sequence[int],
    inside: Sequence[int],
    call: str,
    stacks: Mapping[int, Stack],
    evidence: Sequence[str],
    whole: bool,
) -> Diagnosis:
    """Judge the ranks ``locked``, which wait for a lock, while the ranks ``inside`` wait for them in a collective.

    call    the collective, as text
    stacks  rank -> the newest stack of its main thread
    whole   whether the evidence covers every rank. If it does, a rank in the collective must hold the lock: `deadlock`.
            If it does not, the verdict is `inconclusive`
    """
    summary = (
        f"{ranks_of(locked).capitalize()} {verb(locked, 'waits', 'wait')} for {stacks[locked[0]].detail}, and "
        f"{ranks_of(inside)} {verb(inside, 'waits', 'wait')} in {call} for {verb(locked, 'it', 'them')}."
    )
    if not whole:
        return Diagnosis(
            "inconclusive", "", (), tuple(inside), "undecided",
            (summary, "If a rank in the collective holds the lock, this is a deadlock. But some rank was not "
                      "seen, or was seen only once, so a rank that builds may hold the lock."),
            tuple(evidence), (), (HOLDER, COLLECT["stacks"]),
        )  # fmt: skip
    culprits = tuple(inside) if len(inside) == 1 else ()
    return Diagnosis(
        "deadlock", "lock", culprits, () if culprits else tuple(inside), "likely", (summary,),
        (*evidence, "No stack shows the holder. Only the ranks in the collective can hold the lock, because all "
                    "other ranks wait for it and none builds."),
        ("A process outside the job that holds the lock: look at /proc/locks.",), (HOLDER, COLLECT["stacks"]),
    )  # fmt: skip


def _two_locks(locked: Sequence[int], files: Sequence[str], evidence: Sequence[str], whole: bool) -> Diagnosis:
    summary = (
        f"{ranks_of(locked).capitalize()} wait for {len(files)} locks ({', '.join(files[:4])}). If each of two ranks "
        "holds the lock that the other waits for, they wait for ever."
    )
    if not whole:
        return Diagnosis(
            "inconclusive", "", (), tuple(locked), "undecided",
            (summary, "The stacks do not show which rank holds which lock."),
            tuple(evidence), (), (HOLDER, COLLECT["stacks"]),
        )  # fmt: skip
    return Diagnosis(
        "deadlock", "lock", (), tuple(locked), "likely", (summary,),
        (*evidence, "Every rank waits for one of the two locks in both looks, and no rank builds."),
        ("A process outside the job that holds a lock: look at /proc/locks.",), (HOLDER, COLLECT["stacks"]),
    )  # fmt: skip


def _holder_elsewhere(locked: Sequence[int], suspects: Sequence[int], evidence: Sequence[str], where: str) -> Diagnosis:
    return Diagnosis(
        "inconclusive", "", (), tuple(suspects), "undecided",
        (f"{ranks_of(locked).capitalize()} {verb(locked, 'waits', 'wait')} for a file lock, and no rank seen is "
         "building.", where),
        tuple(evidence), (), (HOLDER, COLLECT["stacks"]),
    )  # fmt: skip


def _lock_lines(stacks: Mapping[int, Stack], locked: Sequence[int]) -> list[str]:
    return [
        f"Rank {rank} waits for {stacks[rank].detail} at {_place(stacks[rank])} ({stacks[rank].source})"
        for rank in locked[:6]
    ]


def _place(stack: Stack) -> str:
    return program_frames(stack.frames, 1) or (stack.frames[0] if stack.frames else "?")


def _stands_still(looks: Sequence[Stack]) -> bool:
    """Whether a rank has two stacks or more, and all show the same wait. If the rank polls, the frames may differ."""
    return len(looks) > 1 and len({(stack.activity, stack.detail) for stack in looks}) == 1
