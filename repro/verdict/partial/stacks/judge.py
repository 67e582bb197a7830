"""Judge a job by stacks alone.

A stack shows a place in the code, but no sequence number. So stacks alone rarely prove a deadlock. They can prove that
a rank builds a kernel while the other ranks wait.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro.trace.foreign.records import Stack
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.stacks.locks import judge_locks
from repro.verdict.partial.stacks.processes import judge_processes
from repro.verdict.partial.stacks.unranked import judge_unranked
from repro.verdict.partial.words import WORKING, program_frames, ranks_of, verb

AGAIN = "a second set of stacks, some seconds later"


def judge_stacks(job: JobRecords) -> Diagnosis | None:
    rows = job.main_stacks()
    if not rows and not job.stacks:
        return None
    by_activity: dict[str, list[int]] = {}
    for rank, stacks in rows.items():
        by_activity.setdefault(stacks[-1].activity, []).append(rank)
    return (
        _builder(job, rows, by_activity)
        or judge_locks(job, rows)
        or judge_processes(job)
        or _queues(job, rows, by_activity)
        or _collectives(job, rows, by_activity)
        or _others(job, rows, by_activity)
        or judge_unranked(job)
    )


def _source(stack: Stack) -> str:
    return str(stack.source)


def _place(stack: Stack) -> str:
    return program_frames(stack.frames, 2) or (stack.frames[0] if stack.frames else "?")


def _builder(
    job: JobRecords, rows: Mapping[int, Sequence[Stack]], by_activity: Mapping[str, list[int]]
) -> Diagnosis | None:
    """Judge ranks that build, compile, load, save or read data, while other ranks wait.

    The verdict is `slow`, and the ranks that work are the culprits. Return None if no rank works or if all ranks work.
    Also return None if no rank waits for a lock, for a message or in a collective.

    rows          rank -> the stacks of its main thread, oldest first
    by_activity   activity in the newest stack, such as "building" or "lock" -> the ranks with this activity
    """
    working = sorted(rank for name in WORKING for rank in by_activity.get(name, []))
    locked = by_activity.get("lock", [])
    waiting = sorted({*locked, *by_activity.get("collective", []), *by_activity.get("idle", [])})
    if not working or not waiting or len(working) >= len(rows):
        return None
    evidence = [
        f"Rank {rank} is {rows[rank][-1].activity}: {rows[rank][-1].detail}, at "
        f"{_place(rows[rank][-1])} ({_source(rows[rank][-1])})"
        for rank in working[:4]
    ]
    if locked:
        evidence.append(
            f"{ranks_of(locked).capitalize()} {verb(locked, 'waits', 'wait')} for "
            f"{rows[locked[0]][-1].detail}, at {_place(rows[locked[0]][-1])} "
            f"({_source(rows[locked[0]][-1])})"
        )
    evidence.append(
        "A rank that builds waits for a child process, so it looks as idle as the ranks that wait for it. Only its "
        "frames show the build."
    )
    what = rows[working[0]][-1]
    return Diagnosis(
        "slow", "", tuple(working), (), "likely",
        (f"{ranks_of(working).capitalize()} {verb(working, 'builds', 'build')} ({what.activity}: {what.detail}).",
         f"{ranks_of(waiting).capitalize()} wait for {'the build lock' if locked else 'it'}."),
        tuple(evidence),
        ("A second look in which no child process of the builder uses a processor: then the build has stopped.",),
        (COLLECT["children"], "a second set of stacks, a minute later"),
    )  # fmt: skip


def _queues(
    job: JobRecords, rows: Mapping[int, Sequence[Stack]], by_activity: Mapping[str, list[int]]
) -> Diagnosis | None:
    """Report `inconclusive` if every rank waits for a message or a request; otherwise return None.

    If an engine waits for an answer of its workers, either a message was lost, or the stacks were taken between two
    steps. If no engine does, the server is possibly idle.

    rows          rank -> the stacks of its main thread, oldest first
    by_activity   activity in the newest stack, such as "idle" (waits for a message) -> the ranks with this activity
    """
    idle = by_activity.get("idle", [])
    if not idle or len(idle) < len(rows):
        return None
    engines = [s for s in job.stacks if s.process.role == "engine" and s.activity == "answer"]
    evidence = [f"Rank {rank}: {rows[rank][-1].detail} ({_source(rows[rank][-1])})" for rank in idle[:4]]
    evidence += [f"{stack.process}: {stack.detail} ({_source(stack)})" for stack in engines[:4]]
    leaving = [stack for stack in job.stacks if stack.activity == "exit"]
    evidence += [
        f"{stack.process} is at its exit and waits for {stack.detail} ({_source(stack)})" for stack in leaving[:4]
    ]
    if not engines:
        summary = (
            f"{ranks_of(idle).capitalize()} {verb(idle, 'waits', 'wait')} for messages, and no rank is in a collective."
            " An idle server looks the same."
        )
        ends = (
            "A process at its exit waits for another one that it started, and that one waits for requests: the program "
            "never ends. Shut the engine down before the exit (vLLM: llm.llm_engine.engine_core.shutdown())."
        )
        return Diagnosis(
            "inconclusive", "", (), (), "undecided",
            (summary, ends) if leaving else (summary,),
            tuple(evidence), (), ("the stacks of the engine and front end processes too", AGAIN),
        )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        ("The engine waits for an answer (response) of its workers, and the workers wait in their "
        "message queue for the next message. No rank is in a collective.",
         "Either a message between them was lost, or the stacks were taken between two steps."),
        tuple(evidence), ("A second set of stacks in which the engine or a worker has moved on.",),
        (
            f"{AGAIN}: if the frames are the same, a message was lost",
            "the counters of the message queue (shm_broadcast): VLLM_LOGGING_LEVEL=DEBUG",
        ),
    )  # fmt: skip


def _collectives(
    job: JobRecords, rows: Mapping[int, Sequence[Stack]], by_activity: Mapping[str, list[int]]
) -> Diagnosis | None:
    inside = by_activity.get("collective", [])
    if not inside:
        return None
    kinds: dict[str, list[int]] = {}
    for rank in inside:
        kinds.setdefault(_canonical(rows[rank][-1].detail), []).append(rank)
    evidence = [
        f"Rank {rank} is in {rows[rank][-1].detail}, at {_place(rows[rank][-1])} ({_source(rows[rank][-1])})"
        for rank in inside[:6]
    ]
    again = [rank for rank in inside if len(rows[rank]) > 1 and len({stack.frames for stack in rows[rank]}) == 1]
    if again:
        evidence.append(
            f"{ranks_of(again).capitalize()} {verb(again, 'is', 'are')} at the same frames in {len(rows[again[0]])} "
            f"dumps ({', '.join(_source(s) for s in rows[again[0]][:2])})"
        )
    host_side = [
        rank
        for rank in inside
        if any("ncclLocalOpAppend" in f or "ncclProxySaveOp" in f for f in rows[rank][-1].frames)
    ]
    if host_side:
        evidence.append(
            f"{ranks_of(host_side).capitalize()} {verb(host_side, 'is', 'are')} on the host side of NCCL "
            "(ncclLocalOpAppend, which enqueues work for NCCL's proxy). In nccl#2353 ranks were there although "
            "all ranks had issued the collective."
        )
    others = sorted(set(rows) - set(inside))
    if len(kinds) > 1:
        named = "; ".join(f"{ranks_of(ranks)} in {kind}" for kind, ranks in kinds.items())
        return Diagnosis(
            "inconclusive", "", (), tuple(sorted(inside)), "undecided",
            (f"The ranks are inside different collectives: {named}.",
             "Stacks show no group and no sequence number. So one of the ranks may have issued the wrong call, or "
             "each rank issued both calls."),
            tuple(evidence), ("Dumps that show both operations queued on both ranks.",),
            (COLLECT["recorder"], COLLECT["ras"], "on each rank, a log of the condition that leads to these calls"),
        )  # fmt: skip
    if others:
        doing = "; ".join(
            f"rank {rank} {rows[rank][-1].activity or 'runs'} {rows[rank][-1].detail}".strip()
            + f" at {_place(rows[rank][-1])}"
            for rank in others[:4]
        )
        return Diagnosis(
            "inconclusive", "", (), tuple(others), "undecided",
            (f"{ranks_of(inside).capitalize()} {verb(inside, 'is', 'are')} in {next(iter(kinds))}, "
        f"{ranks_of(others)} {verb(others, 'is', 'are')} not: {doing}.",),
            tuple(evidence), (), ("a second set of stacks, some seconds later", COLLECT["recorder"]),
        )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (f"All {len(inside)} ranks seen are in {next(iter(kinds))}. Stacks show no sequence number, so the ranks may "
         "be in different collectives.",),
        tuple(evidence), (), (COLLECT["recorder"], "a second set of stacks, some seconds later", COLLECT["kernel"]),
    )  # fmt: skip


def _canonical(detail: str) -> str:
    from repro.ingest.names.operations import operation  # only the names of operations

    return operation(detail.split(" ")[0])


def _others(
    job: JobRecords, rows: Mapping[int, Sequence[Stack]], by_activity: Mapping[str, list[int]]
) -> Diagnosis | None:
    named = [(name, ranks) for name, ranks in by_activity.items() if name]
    if not named:
        return None
    lines = [
        f"{ranks_of(ranks).capitalize()}: {name}, {rows[ranks[0]][-1].detail} ({_source(rows[ranks[0]][-1])})"
        for name, ranks in named
    ]
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        ("The stacks show where the ranks are, but not which rank waits for which.",), tuple(lines), (),
        ("a second set of stacks, some seconds later", COLLECT["recorder"]),
    )  # fmt: skip
