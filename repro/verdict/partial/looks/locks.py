"""Judge a lock file for which ranks wait, by what holds it: a rank, another process, or no process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repro.trace.foreign.records import LockLook
from repro.verdict.partial.diagnosis import Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.looks.ranks import RankLook, build_lines, rank_looks, wait_row
from repro.verdict.partial.words import ranks_of, verb


def judge_lock_files(job: JobRecords) -> Diagnosis | None:
    """Judge the first lock file for which a rank waits in the last look, and which had the same holder in all looks.

    Return None if there is no such lock file.

    A look is one observation of the lock files and processes of a host by `hmr collect`.
    """
    looks = rank_looks(job)
    owners = {(look.last.host, pid): look for look in looks.values() for pid in _pids(look)}
    last = max((lock.look for lock in job.lock_looks), default=0)
    for lock in job.lock_looks:
        waiters = [owners[lock.host, pid] for pid in lock.waiters if (lock.host, pid) in owners]
        if lock.look == last and waiters:
            diagnosis = _judge(job, lock, waiters, owners)
            if diagnosis is not None:
                return diagnosis
    return None


def _pids(look: RankLook) -> list[int]:
    return [*([look.last.process.pid] if look.last.process.pid else []), *(child.pid for child in look.last.children)]


def _judge(
    job: JobRecords, lock: LockLook, waiters: list[RankLook], owners: Mapping[tuple[str, int], RankLook]
) -> Diagnosis | None:
    ranks = sorted({look.rank for look in waiters})
    before = [row for row in job.lock_looks if (row.host, row.path) == (lock.host, lock.path) and row.look < lock.look]
    lines = [f"{ranks_of(ranks).capitalize()} {verb(ranks, 'waits', 'wait')} for {lock.path} ({lock.source})"]
    lines += [f"Rank {look.rank} {look.at}" for look in waiters[:4] if look.stack is not None]
    if any(set(row.holders) != set(lock.holders) for row in before) or not before:
        return None  # the holder changed, or the lock was observed only once
    holders = [owners[lock.host, pid] for pid in lock.holders if (lock.host, pid) in owners]
    if holders:
        return _held_by_rank(lock, ranks, holders[0], lines)
    if lock.holders:
        return _held_outside(lock, ranks, lines)
    if lock.hidden:
        return _holder_hidden(lock, ranks, lines)
    return _held_by_nobody(lock, ranks, lines)


def _held_by_rank(lock: LockLook, ranks: list[int], holder: RankLook, lines: list[str]) -> Diagnosis | None:
    held = f"Rank {holder.rank} holds {lock.path} ({lock.source}), and {holder.at}"
    waits = (_wait(lock, ranks, [holder.rank], f"rank {holder.rank} holds it"),)
    if holder.waits:
        return Diagnosis(
            "deadlock", "lock", (holder.rank,), (), "likely",
            (f"Rank {holder.rank} holds the lock {lock.path} and waits in a collective for {ranks_of(ranks)}, which "
             f"{verb(ranks, 'waits', 'wait')} for that lock.",),
            (held, *lines), ("A later look in which the lock has another holder.",),
            (f"where rank {holder.rank} takes the lock, from its stack: the program must release the lock before the "
             "collective",), waits=waits,
        )  # fmt: skip
    if holder.still and not holder.compilers:
        return Diagnosis(
            "stall", "host", (holder.rank,), (), "likely",
            (f"Rank {holder.rank} holds the lock {lock.path} and does nothing; {ranks_of(ranks)} "
             f"{verb(ranks, 'waits', 'wait')} for the lock.",),
            (held, *lines), (f"A later look in which rank {holder.rank} has moved on.",), (), waits=waits,
        )  # fmt: skip
    children = "; ".join(f"{child.name} since {child.age_s:.0f} s" for child in holder.compilers[:3])
    work = f"builds ({children})" if children else f"works ({holder.cores:.2f} processors)"
    return Diagnosis(
        "slow", "", (holder.rank,), (), "likely",
        (f"Rank {holder.rank} {work} while it holds the lock {lock.path}; {ranks_of(ranks)} "
         f"{verb(ranks, 'waits', 'wait')} for that lock. The job is slow, and not in a deadlock.",),
        (held, *build_lines(holder), *lines),
        (f"A later look in which the compilers of rank {holder.rank} used no processor.",),
        ("a second `collect`, a minute later",),
        waits=waits,
    )  # fmt: skip


def _held_outside(lock: LockLook, ranks: list[int], lines: list[str]) -> Diagnosis:
    names = ", ".join(lock.names) or f"process {lock.holders[0]}"
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (f"{ranks_of(ranks).capitalize()} {verb(ranks, 'waits', 'wait')} for the lock {lock.path}, which {names} "
         "holds. That process is not a rank of this job.",),
        tuple(lines), (), (f"what that process does: py-spy dump --nonblocking --pid {lock.holders[0]}; ps -fp "
                           f"{lock.holders[0]}",),
        waits=(_wait(lock, ranks, [], f"{names} holds it"),),
    )  # fmt: skip


def _holder_hidden(lock: LockLook, ranks: list[int], lines: list[str]) -> Diagnosis:
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (f"{ranks_of(ranks).capitalize()} {verb(ranks, 'waits', 'wait')} for the lock {lock.path}. No visible process "
         f"holds it, but this user may not see the open files of {lock.hidden} Python processes.",),
        tuple(lines), (), ("which process has the lock file open: run collect as root",),
    )  # fmt: skip


def _held_by_nobody(lock: LockLook, ranks: list[int], lines: list[str]) -> Diagnosis:
    since = f", last changed {lock.age_s:.0f} s ago" if lock.age_s is not None else ""
    return Diagnosis(
        "deadlock", "lock", (), (), "likely",
        (f"{ranks_of(ranks).capitalize()} {verb(ranks, 'waits', 'wait')} for the lock file {lock.path}, which no "
         "process holds: a process that ended left it behind.",),
        (f"No process of this host has {lock.path} open, in both looks{since} ({lock.source})", *lines),
        ("A process of another host or container that shares this folder has the file open.",),
        (f"whether a process of another host uses this folder; only if none does: rm {lock.path}",),
        waits=(_wait(lock, ranks, [], "no process holds it any more"),),
    )  # fmt: skip


def _wait(lock: LockLook, ranks: list[int], awaited: list[int], why: str) -> dict[str, Any]:
    return wait_row(ranks, f"lock {lock.path}", awaited, why, str(lock.source))
