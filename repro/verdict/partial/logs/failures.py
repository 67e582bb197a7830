"""Judge an error that ended a process: the other ranks then wait for this process for ever."""

from __future__ import annotations

import re
from collections.abc import Sequence

from repro.trace.foreign.records import Failure, TimedOut
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import ranks_of, verb

CLOCK_SKEW_S = 2.0
ZONE_S, ZONE_SLACK_S = 1800.0, 300.0
SURVIVED = re.compile(
    r"\bretrying\b|will (?:be )?retr(?:y|ied)|falling back|\brecovered\b|\bignor(?:ed|ing)\b|\bskipping\b",
    re.IGNORECASE,
)
"""Words in an error message that show that the program went on after the error, such as "retrying"."""

_XID_OF_EXIT = re.compile(r"Xid 4[35]\b")
"""Codes of GPU errors (Xid 43, 45) that the driver also logs if a process ends for another reason. So these
codes prove no cause."""

ROOTS = ("memory", "device", "killed", "exception")
_WEIGHT = {"memory": 0, "device": 0, "killed": 1, "exception": 2, "ended": 3}


def judge_failures(job: JobRecords) -> Diagnosis | None:
    roots = [record for record in job.failures if record.kind in ROOTS and not _is_aftermath(record, job)]
    roots = roots or [record for record in job.failures if _has_ended(record) and not _is_aftermath(record, job)]
    if not roots:
        return None
    first = _first(roots)
    if first is None:
        return _undecided(
            roots,
            "and the logs do not show which was first: the lines have no times, or the clocks are of two time zones",
        )
    others = [record for record in roots if record.process.rank != first.process.rank]
    if first.kind == "exception" and any(record.text == first.text for record in others):
        return _undecided([first, *(record for record in others if record.text == first.text)], "with the same error")
    if [record for record in others if record.kind == first.kind and _together(first, record)]:
        return _undecided(
            [first, *others], "within two seconds of each other: the clocks of two hosts do not show which was first"
        )
    if first.kind == "exception" and not _has_consequence(job, first):
        return _unproven(first)
    return _crash(job, first)


def _has_ended(failure: Failure) -> bool:
    """Whether an engine logged that one of its workers ended. Such a line does not say why the worker ended."""
    return failure.kind == "ended" and failure.process.role == "worker" and failure.process.rank is not None


def _is_aftermath(failure: Failure, job: JobRecords) -> bool:
    """Whether an error cannot be the cause of the hang.

    This is so if the rank went on after the error, if a time-out came before the error, if the line is of an earlier
    process of the rank, or if it is a GPU error that the driver also logs when a process ends for another reason.
    """
    rank = failure.process.rank
    if SURVIVED.search(failure.text) or _XID_OF_EXIT.search(failure.text):
        return True
    if failure.kind in ("exception", "memory") and rank in _seen_waiting(job):
        return True  # the rank went on after the error
    alive = _alive(job) if failure.kind in ("exception", "memory", "killed", "ended") else set()
    if rank in alive or (rank is None and alive and alive >= set(range(job.world_size() or len(alive) + 1))):
        return True  # the line is of an earlier process of this rank, or of a rank of an earlier job
    own = [record for record in job.timeouts if rank is not None and record.rank == rank]
    if failure.kind == "exception" and own:
        return True  # the watchdog of this rank printed later, so the program may have caught the error
    if any(record.source.file == failure.source.file and _line(record) < _line(failure) for record in own):
        return True
    bounds = [record.at_s for record in job.timeouts] + [
        record.at_s for record in job.failures if record.kind == "timeout"
    ]
    fired = [at_s for at_s in bounds if at_s is not None]
    return failure.at_s is not None and bool(fired) and failure.at_s >= min(fired)


def _alive(job: JobRecords) -> set[int]:
    """Return the ranks whose worker process still existed when `hmr collect` last observed its host."""
    looks = [look for look in job.process_looks if look.process.role in ("worker", "")]
    last = {look.process.rank: look for look in sorted(looks, key=lambda look: look.look)}
    return {rank for rank, look in last.items() if rank is not None and look.state not in ("Z", "X")}


def _line(record: Failure | TimedOut) -> int:
    place = re.search(r"\d+", record.source.place)
    return int(place[0]) if place else 0


def _seen_waiting(job: JobRecords) -> set[int]:
    """Return the ranks that certainly did not end before the hang.

    A rank did not end if its main thread has stacks and the last one is not at the exit of the process, if its dump has
    an unfinished operation, or if its watchdog and the watchdog of another rank reported the same time-out.
    """
    waiting = {rank for rank, dump in job.recorders.items() if any(record.pending for record in dump.groups)}
    alive = {rank for rank, rows in job.main_stacks().items() if rows[-1].activity != "exit"}
    calls: dict[tuple[str, int | None], set[int]] = {}
    for record in job.timeouts:
        if record.rank is not None:
            calls.setdefault((record.call.op, record.call.seq), set()).add(record.rank)
    shared = {rank for ranks in calls.values() if len(ranks) > 1 for rank in ranks}
    return waiting | alive | shared


def _first(roots: Sequence[Failure]) -> Failure | None:
    """Return the earliest of the errors that can be the cause; None if their times may be of different time zones.

    If one of the errors has no time, return the most severe error; None if several ranks have errors of this severity.
    """
    stamped = [record for record in roots if record.at_s is not None]
    if stamped and len(stamped) == len(roots):
        first = min(stamped, key=lambda record: (record.at_s or 0.0, _WEIGHT[record.kind]))
        return None if any(_zones_may_differ(first, record) for record in stamped) else first
    heavy = sorted(roots, key=lambda record: _WEIGHT[record.kind])
    best = [record for record in heavy if _WEIGHT[record.kind] == _WEIGHT[heavy[0].kind]]
    ranks = {record.process.rank for record in best}
    return best[0] if len(ranks) == 1 else None


def _zones_may_differ(one: Failure, two: Failure) -> bool:
    """Whether the times of two errors may be of different time zones.

    This is so if the errors are of different ranks and files, and if their times differ by roughly a multiple of half
    an hour.
    """
    gap = abs((one.at_s or 0.0) - (two.at_s or 0.0))
    if one.source.file == two.source.file or one.process.rank == two.process.rank or gap < ZONE_S - ZONE_SLACK_S:
        return False
    return min(gap % ZONE_S, ZONE_S - gap % ZONE_S) <= ZONE_SLACK_S


def _together(one: Failure, two: Failure) -> bool:
    return one.at_s is not None and two.at_s is not None and abs(one.at_s - two.at_s) < CLOCK_SKEW_S


def _has_consequence(job: JobRecords, failure: Failure) -> bool:
    """Whether another record shows a consequence of the error: an ended process, a time-out or a dump."""
    rank = failure.process.rank
    ended = [record for record in job.failures if record.kind in ("consequence", "timeout", "killed", "ended")]
    gone = [record for record in job.notes if record.kind in ("local rank", "torchrun") and record.value == str(rank)]
    return bool(ended or gone or job.left or job.timeouts or job.recorders)


def _unproven(failure: Failure) -> Diagnosis:
    rank = failure.process.rank
    return Diagnosis(
        "inconclusive", "", (), (rank,) if rank is not None else (), "undecided",
        (f"{_name(failure)} logged an error: {failure.text}. Nothing here shows whether the error ended the process.",),
        (f"{_name(failure)}: {failure.text} ({failure.source})",), (),
        ("the end of that log, and whether the process still runs: ps -o pid,etime,stat,args -p PID",
         COLLECT["stacks"]),
    )  # fmt: skip


def _name(failure: Failure) -> str:
    words = str(failure.process)
    return words[:1].upper() + words[1:]


def _crash(job: JobRecords, first: Failure) -> Diagnosis:
    rank, who = first.process.rank, _name(first)
    later = [
        record for record in job.failures if record.kind in ("consequence", "timeout") and record.process.rank != rank
    ]
    waiting = sorted({record.rank for record in job.timeouts if record.rank is not None and record.rank != rank})
    others = sorted(
        ({record.process.rank for record in later if record.process.rank is not None} | set(waiting)) - {rank}
    )
    unseen = _unseen(job, rank)
    collect = list(_COLLECT[first.kind])
    if unseen:
        collect.append(f"the log of {ranks_of(unseen)}, which is missing")
    certain = rank is not None and first.at_s is not None and not unseen and first.kind != "ended"
    return Diagnosis(
        "crash", _CAUSE[first.kind], (rank,) if rank is not None else (), (), "certain" if certain else "likely",
        (f"{who} ended first: {first.text.rstrip('.')}.",
         f"What {ranks_of(others)} {verb(others, 'reports', 'report')} came later and is a consequence." if others
         else "What other ranks report is a consequence."),
        (f"{who}: {first.text} ({first.source})", *_closed(job, rank),
         *(f"{record.process}, later: {record.text} ({record.source})" for record in _one_a_rank(later)[:4]),
         *_waited(waiting)),
        ("An older error of another rank. Look for it in the logs that were not given.",),
        tuple(collect),
    )  # fmt: skip


def _closed(job: JobRecords, rank: int | None) -> list[str]:
    """Return a sentence that says which ranks' NCCL logs report a connection that ``rank`` closed; [] if none does.

    These logs contain local ranks, so ``rank`` is compared with a local rank.
    """
    notes = [
        record for record in job.notes if record.kind == "local rank" and rank is not None and record.value == str(rank)
    ]
    if not notes:
        return []
    seen_by = ranks_of({record.process.rank for record in notes if record.process.rank is not None})
    return [f"NCCL on {seen_by} saw local rank {rank} close its connection ({notes[0].source})"]


def _waited(ranks: Sequence[int]) -> list[str]:
    if not ranks:
        return []
    return [
        f"{ranks_of(ranks).capitalize()} ran into time-outs. That is a consequence: {verb(ranks, 'it', 'they')} waited "
        "for a rank that had ended."
    ]


_CAUSE = {"memory": "memory", "device": "hardware", "killed": "killed", "exception": "error",
          "ended": "dead_rank"}  # fmt: skip
_COLLECT = {
    "memory": ("on the host of that rank, for memory of the host: dmesg -T | grep -i oom",
               "in the program, the memory in use before the error: torch.cuda.memory_summary()"),
    "device": ("the kernel that failed, by CUDA_LAUNCH_BLOCKING=1 or compute-sanitizer, and on the host of that rank: "
               "dmesg -T | grep -i xid",),
    "killed": ("the exit code in the launcher's log, and what killed the process, on the host of that rank: "
               "dmesg -T | grep -iE 'oom|killed process'",),
    "exception": ("the traceback of that rank from its beginning",),
    "ended": ("the exit code of that process, from its launcher, and who ended it, on its host: "
              "dmesg -T | grep -iE 'oom|killed process'",),
}  # fmt: skip


def _one_a_rank(failures: Sequence[Failure]) -> list[Failure]:
    seen: dict[object, Failure] = {}
    for record in failures:
        seen.setdefault(record.process.rank if record.process.rank is not None else record.process.title, record)
    return list(seen.values())


def _unseen(job: JobRecords, rank: int | None) -> list[int]:
    known = set(job.ranks())
    size = job.world_size() or (max(known) + 1 if known else 0)
    return sorted(r for r in range(size) if r not in known and r != rank) if size <= 1024 else []


def _undecided(roots: Sequence[Failure], why: str) -> Diagnosis:
    ranks = sorted({record.process.rank for record in roots if record.process.rank is not None})
    causes = {_CAUSE[record.kind] for record in roots}
    who = ranks_of(ranks).capitalize() if ranks else "Several processes"
    return Diagnosis(
        "crash", causes.pop() if len(causes) == 1 else "error", (), tuple(ranks), "undecided",
        (f"{who} failed, {why}.",),
        tuple(f"{record.process}: {record.text} ({record.source})" for record in _one_a_rank(roots)[:6]),
        ("An older error of one of these ranks.",),
        ("the same logs with time stamps of one time zone (UTC): TORCH_CPP_LOG_LEVEL=INFO, or the launcher's logs",),
    )  # fmt: skip
