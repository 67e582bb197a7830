"""Judge a cycle of waits in a server whose ranks have several processes: an engine and a worker.

An example: a worker waits for its engine, which waits in a collective for a second engine. The second engine waits for
its own worker, which waits in a collective for the first worker. Flight Recorder and watchdog show only some of
these waits; the stacks show all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from repro.trace.foreign.records import Stack
from repro.verdict.cycle import find_cycle
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import ranks_of, verb

Place = tuple[str, int]
"""A process of a server: ("worker" or "engine", rank)."""


def judge_processes(job: JobRecords) -> Diagnosis | None:
    looks: dict[Place, Sequence[Stack]] = {}
    for role in ("worker", "engine"):
        looks |= {(role, rank): rows for rank, rows in job.main_stacks(role).items() if rows[-1].process.role == role}
    cycle = find_cycle({place: _waits_for(place, rows[-1], looks) for place, rows in looks.items()})
    if len({role for role, _ in cycle}) < 2:
        return None  # other rules judge cycles that consist of collectives only
    lines = [
        f"The {role} of rank {rank} waits: {looks[role, rank][-1].activity} {looks[role, rank][-1].detail} "
        f"({looks[role, rank][-1].source})"
        for role, rank in cycle
    ]
    chain = " -> ".join(f"{role} of rank {rank}" for role, rank in (*cycle, cycle[0]))
    early = _asks_early(looks)
    summary = (f"These processes wait for each other in a cycle: {chain}.", *_why_early(early, looks))
    if all(len(looks[place]) > 1 and len({s.activity for s in looks[place]}) == 1 for place in cycle):
        return Diagnosis(
            "deadlock", "order", (), early, "likely", summary,
            (*lines, "All of these processes are at the same place in two looks or more."),
            ("A later look in which one of these processes has moved on.",),
            ("which execution or question was left out: record the next start, python -m repro record -- vllm serve …",
             "the decisions of the engines in the last steps: VLLM_LOGGING_LEVEL=DEBUG", COLLECT["recorder"]),
        )  # fmt: skip
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (*summary, "One look may show a moment between two steps."), tuple(lines), (),
        ("a second set of stacks, some seconds later: if the places are the same, it is a deadlock", COLLECT["stacks"]),
    )  # fmt: skip


def _asks_early(looks: Mapping[Place, Sequence[Stack]]) -> tuple[int, ...]:
    """Return the ranks whose worker is idle and whose engine asks the other engines whether any rank has requests.

    All engines ask this question together, after a fixed number of model executions. If the workers of all other ranks
    are in a collective, their executions have not ended, so the returned ranks ask too early. Otherwise return ().

    looks   ("worker" or "engine", rank) -> the stacks of the main thread of this process, oldest first
    """
    workers = {rank: rows[-1].activity for (role, rank), rows in looks.items() if role == "worker"}
    early = tuple(
        rank
        for rank, activity in sorted(workers.items())
        if activity == "idle" and ("engine", rank) in looks and looks["engine", rank][-1].activity == "collective"
    )
    return early if all(workers[rank] == "collective" for rank in workers.keys() - set(early)) else ()


def _why_early(early: Sequence[int], looks: Mapping[Place, Sequence[Stack]]) -> list[str]:
    others = sorted({rank for _, rank in looks} - set(early))
    if not early or not others:
        return []
    them, rest = ranks_of(early), ranks_of(others)
    return [
        f"The engine of {them} asks whether any rank has requests, while {rest} {verb(others, 'is', 'are')} in an "
        f"execution that {them} {verb(early, 'has', 'have')} not begun.",
        f"Either {them} left out an execution, or {rest} left out the question, or they ask after different numbers of "
        "executions (vLLM's --dp-sync-interval). Stacks do not show which.",
    ]


def _waits_for(place: Place, stack: Stack, looks: Mapping[Place, Sequence[Stack]]) -> list[Place]:
    role, rank = place
    if stack.activity == "collective":
        return [other for other, rows in looks.items() if other[0] == role and rows[-1].activity != "collective"]
    if role == "worker" and stack.activity == "idle":
        return [("engine", rank)] if ("engine", rank) in looks else []
    if role == "engine" and stack.activity == "answer":
        return [("worker", rank)] if ("worker", rank) in looks else []
    return []
