"""Judge the rank for which the other ranks wait, if this rank itself waits for no rank.

Such a rank has ended, is suspended (by SIGSTOP or a debugger), works, or does nothing. A look is one observation of the
processes by `hmr collect`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro.store.text import counted
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.looks.ranks import (
    AMONG_RANKS,
    BUSY_CORES,
    WAITING,
    RankLook,
    build_lines,
    call_of,
    place_of,
    rank_looks,
    seconds_between,
    wait_row,
    what_it_does,
)
from repro.verdict.partial.words import ranks_of, verb

RUNNING_CORES = 0.05
"""If the main thread of a rank uses at least this share of a processor, the rank is running, not blocked."""
LATER = "A third look, some seconds later, in which the waiting ranks have moved on."


def judge_hosts(job: JobRecords) -> Diagnosis | None:
    """Judge the rank for which the others wait, by its process state, processor use, child processes and stacks.

    Return None if the looks do not show such a rank.
    """
    looks = rank_looks(job)
    return (_ended(job, looks) or _stopped(looks) or _builds(looks) or _absent(job, looks)) if looks else None


def judge_places_of_ranks(job: JobRecords) -> Diagnosis | None:
    """Say where each rank is. This rule is used if no earlier rule finds out which ranks wait for which."""
    looks = [look for look in rank_looks(job).values() if look.stack is not None]
    if not looks:
        return None
    still = [look.rank for look in looks if look.still]
    moved = f"; {ranks_of(still)} did nothing between the two looks" if still else ""
    return Diagnosis.inconclusive(
        f"The looks show where the ranks are{moved}, but not which rank waits for which.",
        *(f"Rank {look.rank} {look.at}." for look in looks[:6]),
        collect=("a second `collect`, a minute later: a rank that has moved on does not hang", "recorder"),
    )


def _ended(job: JobRecords, looks: Mapping[int, RankLook]) -> Diagnosis | None:
    missing = {int(note.value): note for note in job.notes if note.kind == "no process"}
    ended = sorted({*(rank for rank, look in looks.items() if look.ended), *(missing.keys() - looks.keys())})
    others = [look for rank, look in looks.items() if rank not in ended]
    if not ended or not others or not all(_stands(look) for look in others):
        return None
    sources = [f"Rank {rank} has ended ({looks[rank].last.source})" if rank in looks else
               f"Rank {rank} has no process on this host ({missing[rank].source})" for rank in ended]  # fmt: skip
    return Diagnosis(
        "crash", "dead_rank", tuple(ended), (), "likely",
        (f"{_names(ended)} {verb(ended, 'has', 'have')} ended, and the other ranks still wait.", _they_wait(others)),
        (*sources, *_where(others)),
        ("A process of that rank on another host.",),
        (f"the end of the log of {ranks_of(ended)}", "what ended the process: dmesg -T | grep -iE 'oom|killed "
                                                     "process'"),
        waits=_waits(others, ended, "has ended"),
    )  # fmt: skip


def _stopped(looks: Mapping[int, RankLook]) -> Diagnosis | None:
    stopped = [rank for rank, look in looks.items() if look.stopped]
    others = [look for rank, look in looks.items() if rank not in stopped]
    if not stopped:
        return None
    # a rank that spins while it waits does not look idle, so the other ranks need not all stand still
    all_stand = bool(others) and all(map(_stands, others))
    how = "a debugger" if any(looks[rank].last.state == "t" for rank in stopped) else "a signal (SIGSTOP, Ctrl-Z)"
    lines = [f"Rank {rank} is in state {looks[rank].last.state} in both looks ({looks[rank].last.source})"
             for rank in stopped]  # fmt: skip
    pids = " ".join(str(looks[rank].last.process.pid) for rank in stopped)
    return Diagnosis(
        "stall", "host", tuple(stopped), (), "certain" if all_stand else "likely",
        (f"{_names(stopped)} {verb(stopped, 'is', 'are')} stopped by {how}.",
         *([_they_wait(others)] if all_stand else [])),
        (*lines, *_where(others)), (LATER,),
        (f"who stopped the process; to continue it: kill -CONT {pids}",), waits=_waits(others, stopped, "is stopped"),
    )  # fmt: skip


def _builds(looks: Mapping[int, RankLook]) -> Diagnosis | None:
    """Judge ranks that build a kernel while all other ranks wait: `slow`. Child processes or stacks show the build."""
    builders = [rank for rank, look in looks.items() if look.compilers or look.activity in ("building", "compiling")]
    others = [look for rank, look in looks.items() if rank not in builders]
    if not builders or not others or not all(_stands(look) or look.activity == "lock" for look in others):
        return None
    idle = [rank for rank in builders if looks[rank].cores < BUSY_CORES]
    lines = [line for rank in builders for line in build_lines(looks[rank])]
    if idle == builders and all(looks[rank].apart_s > 0 for rank in builders):
        lines.append(f"The compilers of {ranks_of(builders)} used no processor between the two looks")
    what = _what_is_built(looks[builders[0]])
    return Diagnosis(
        "slow", "", tuple(builders), (), "likely",
        (f"{_names(builders)} {verb(builders, 'builds', 'build')}{what}. The job is slow, and not in a deadlock.",
         _they_wait(others)),
        (*lines, *_where(others)),
        ("A later look in which the compilers used no processor: then the build stands still.",),
        (COLLECT["children"], "a second `collect`, a minute later"), waits=_waits(others, builders, "builds"),
    )  # fmt: skip


def _what_is_built(look: RankLook) -> str:
    child = max(look.compilers, key=lambda row: row.cpu_s, default=None)
    if child is None:
        return f" ({look.stack.detail})" if look.stack else ""
    oldest = max(row.age_s for row in look.compilers)
    names = ", ".join(sorted({row.name for row in look.compilers}))
    return f" ({counted(len(look.compilers), 'compiler')}: {names}; since {oldest:.0f} s)"


def _absent(job: JobRecords, looks: Mapping[int, RankLook]) -> Diagnosis | None:
    """Judge ranks that are in no collective while all other ranks wait.

    The verdict is `stall` if all of these ranks do nothing, and `slow` if at least one works.
    """
    waiting = [look for look in looks.values() if look.waits or look.spins or (look.stack is None and look.still)]
    outside = [look for look in looks.values() if look not in waiting]
    if not waiting or not outside or not _all_seen(job, looks):
        return None
    if any(look.activity in WAITING for look in outside):
        return None
    if not all(look.waits for look in waiting if look.stack) and not all(look.same_frames for look in outside):
        return None  # a rank that spins may have left the collective between the looks; then the others moved, too
    blind = [look for look in looks.values() if look.stack is None]
    if blind and (len(outside) > 1 or outside[0].first_thread_cores < RUNNING_CORES or job.has_devices):
        return None  # a busy rank may only wait for its device (spin), and the rank that it waits for may sleep
    ranks = [look.rank for look in outside]
    standing = [look for look in outside if look.still]
    lines = [f"Rank {look.rank} {_use(look)}" for look in outside[:4]]
    lines += [line for look in outside[:4] for line in _below(job, look)]
    summary = f"{_names(ranks)} {verb(ranks, 'is', 'are')} in no collective: {'; '.join(map(_doing, outside[:4]))}."
    if len(standing) == len(outside):
        return Diagnosis(
            "stall", "host", tuple(ranks), (), "likely",
            (summary, f"{verb(ranks, 'It', 'They')} did nothing between the two looks.", _they_wait(waiting)),
            (*lines, *_where(waiting)), (LATER,),
            (f"what {ranks_of(ranks)} {verb(ranks, 'waits', 'wait')} for, from the last frames above, and from py-spy "
             "dump --native --nonblocking --pid PID",), waits=_waits(waiting, ranks, "is outside any collective"),
        )  # fmt: skip
    return Diagnosis(
        "slow", "straggler", tuple(ranks), (), "likely",
        (summary, _they_wait(waiting)), (*lines, *_where(waiting)),
        (f"A later look in which {ranks_of(ranks)} still {verb(ranks, 'runs', 'run')} but will not enter this "
         "collective, for example after an exception that the program caught.",),
        (f"a second `collect`, a minute later: if the waits are the same, {ranks_of(ranks)} will not enter the "
         "collective", COLLECT["recorder"]),
        waits=_waits(waiting, ranks, "is in no collective"),
    )  # fmt: skip


def _all_seen(job: JobRecords, looks: Mapping[int, RankLook]) -> bool:
    """Whether every rank of the job was observed twice."""
    size = job.world_size()
    return all(look.apart_s > 0 for look in looks.values()) and (size is None or len(looks) >= size)


def _doing(look: RankLook) -> str:
    if look.stack is None:
        return f"rank {look.rank} runs, its main thread on {look.first_thread_cores:.2f} processors"
    return f"rank {look.rank} {what_it_does(look.stack)} at {place_of(look.stack)}"


def _use(look: RankLook) -> str:
    used = f"used {look.cores:.2f} processors" if look.cores >= BUSY_CORES else "used no processor"
    return f"{used} in {look.apart_s:.1f} s and {look.at}" if look.stack else f"{used} in {look.apart_s:.1f} s"


def _below(job: JobRecords, look: RankLook) -> list[str]:
    """Return, for each Python process that the rank started (such as a data loader's worker), what its stack shows."""
    pids = {child.pid for child in look.last.children}
    stacks = {
        stack.process.pid: stack for stack in job.stacks if stack.process.pid in pids and stack.thread == "MainThread"
    }
    return [
        f"The process {pid} below that rank is at {place_of(stack)} ({stack.source})" for pid, stack in stacks.items()
    ][:3]


def _stands(look: RankLook) -> bool:
    """Whether the rank does nothing but wait, as far as the two looks show."""
    return look.waits or look.still or look.activity == "lock" or (look.stack is None and look.idle)


def _they_wait(looks: Sequence[RankLook]) -> str:
    ranks = [look.rank for look in looks]
    calls = sorted({call_of(look) for look in looks if look.activity in AMONG_RANKS})
    where = f" in {', '.join(calls[:3])}" if calls else ""
    return f"{_names(ranks)} {verb(ranks, 'waits', 'wait')}{where}, for {seconds_between(looks):.0f} s or longer."


def _where(looks: Sequence[RankLook]) -> list[str]:
    lines = [f"Rank {look.rank} {look.at}" for look in looks[:6]]
    return [*lines, *([f"{len(looks) - 6} more ranks wait"] if len(looks) > 6 else [])]


def _waits(looks: Sequence[RankLook], awaited: Sequence[int], why: str) -> tuple[dict[str, object], ...]:
    places: dict[str, list[RankLook]] = {}
    for look in looks:
        places.setdefault(call_of(look), []).append(look)
    return tuple(
        wait_row([look.rank for look in rows], place, awaited, f"{ranks_of(awaited)} {why}", rows[0].source)
        for place, rows in places.items()
    )


def _names(ranks: Sequence[int]) -> str:
    return ranks_of(ranks).capitalize()
