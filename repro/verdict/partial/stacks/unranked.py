"""Judge stacks of processes whose ranks are unknown: say where each process is, and how to find out its rank."""

from __future__ import annotations

from repro.store.text import counted
from repro.trace.foreign.records import Stack
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords, is_main

MOST_PLACES, MOST_PROCESSES = 6, 8


def judge_unranked(job: JobRecords) -> Diagnosis | None:
    """Judge stacks of processes whose rank is unknown. Return None if there are none.

    This is the last of the rules for stacks, so it is used only if the stacks of known ranks, if any, decided nothing.
    If they did decide, the processes without a rank are launchers or front ends, and need no judgement.
    """
    last: dict[int | str, Stack] = {}
    for stack in job.stacks:
        if stack.process.rank is None and is_main(stack):
            last[stack.process.pid if stack.process.pid is not None else stack.source.file] = stack
    places: dict[str, list[Stack]] = {}
    for stack in last.values():
        where = f"{stack.activity} {stack.detail}".strip() or (stack.frames[0] if stack.frames else "no frame")
        places.setdefault(where, []).append(stack)
    if not places:
        return None
    ordered = sorted(places.items(), key=lambda item: -len(item[1]))
    pids = " ".join(str(pid) for pid in last if isinstance(pid, int))
    ask = (
        f"the rank of each process: for p in {pids or 'PIDS'}; do echo $p; tr '\\0' '\\n' < /proc/$p/environ | grep -w "
        "RANK; done"
    )
    return Diagnosis(
        "inconclusive", "", (), (), "undecided",
        (f"The stacks show {counted(len(last), 'process')}, but not {'its rank' if len(last) == 1 else 'their ranks'}.",
         *(f"{_named(stacks)}: {where}." for where, stacks in ordered[:MOST_PLACES])),
        tuple(f"{_named(stacks)}: {stacks[0].frames[0]} ({stacks[0].source})" for _, stacks in ordered[:MOST_PLACES]
              if stacks[0].frames),
        (), (ask, COLLECT["recorder"], "a second set of stacks, some seconds later"),
    )  # fmt: skip


def _named(stacks: list[Stack]) -> str:
    names = [str(stack.process) for stack in stacks[:MOST_PROCESSES]]
    return ", ".join(names) + (f" and {len(stacks) - MOST_PROCESSES} more" if len(stacks) > MOST_PROCESSES else "")
