"""Judge a rank that issues a collective at a place in the code where the program should never issue this collective.

Usually stacks do not show which of two ranks issued the wrong collective. But a serving engine issues some collectives
at one place only: the step agreement comes before the forward pass of the model. If the stack of a rank shows a step
agreement inside a layer of the model, this rank has issued an additional collective.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from repro.trace.foreign.records import Stack
from repro.verdict.partial.diagnosis import COLLECT, Diagnosis
from repro.verdict.partial.job_records import JobRecords
from repro.verdict.partial.words import program_frames, ranks_of, verb

WAITING = ("collective", "idle")
MAX_LINES = 4


@dataclass(frozen=True, slots=True)
class Place:
    """A collective that a program issues at one place only. The patterns match frames of a stack.

    name    the name of the collective
    inside  pattern of the function that issues the collective
    below   pattern of functions that must not call `inside`, directly or indirectly, such as the layers of a model
    unless  pattern of functions through which `below` may call `inside` nevertheless; None if there are no such
            functions
    rule    a sentence that says where the program issues the collective
    """

    name: str
    inside: re.Pattern[str]
    below: re.Pattern[str]
    unless: re.Pattern[str] | None
    rule: str


PLACES = (
    Place(
        "the step agreement",
        re.compile(r"\((?:.*/)?vllm/v1/worker/(?:gpu/)?dp_utils\.py"),
        re.compile(r"\((?:.*/)?vllm/(?:model_executor/(?:layers|models)|models)/"),
        re.compile(r"\((?:.*/)?vllm/forward_context\.py"),  # a model that runs an encoder with a context of its own
        "vLLM issues it before the forward pass of the model, and in no layer",
    ),
    Place(
        "the step agreement",
        re.compile(r"\bprepare_mlp_sync_batch\w* \((?:.*/)?sglang/srt/managers/"),
        re.compile(r"\((?:.*/)?sglang/srt/(?:layers|models)/"),
        None,
        "SGLang's scheduler issues it before the forward pass of the model, and in no layer",
    ),
)


def judge_places(job: JobRecords) -> Diagnosis | None:
    """Judge ranks that issue a collective at a wrong place in the code, while all other ranks wait.

    PLACES says for some collectives where in the code they must not be issued.
    """
    rows = job.main_stacks()
    found = {rank: match for rank, stacks in rows.items() if (match := _out_of_place(stacks[-1])) is not None}
    others = {rank: stacks for rank, stacks in rows.items() if rank not in found}
    if not found or not others or any(stacks[-1].activity not in WAITING for stacks in rows.values()):
        return None
    place, layer = next(iter(found.values()))
    ranks = sorted(found)
    summary = (
        f"{ranks_of(ranks).capitalize()} {verb(ranks, 'is', 'are')} in {place.name} below a layer of the model "
        f"({layer}). {place.rule}.",
        f"{ranks_of(others).capitalize()} {verb(set(others), 'waits', 'wait')} in another call for "
        f"{verb(ranks, 'that rank', 'those ranks')}.",
    )
    lines = tuple(_lines({rank: rows[rank] for rank in ranks}.values()) + _lines(others.values()))
    collect = ("which code calls it there: see the frames of that rank above", COLLECT["recorder"])
    still = all(_stands_still(stacks) for stacks in rows.values())
    if not still or len(ranks) > 1:
        why = "Several ranks are at this place." if still else "One look may have caught the moment between two steps."
        return Diagnosis(
            "inconclusive", "", (), tuple(ranks), "undecided", (*summary, why), lines, (),
            ("a second set of stacks, some seconds later", *collect),
        )  # fmt: skip
    return Diagnosis(
        "deadlock", "extra", tuple(ranks), (), "likely", summary,
        (*lines, f"Each rank is at the same place in {min(map(len, rows.values()))} looks or more."),
        ("The same call in the same layer on another rank, in an earlier step: then all ranks run a program that "
         "issues it there.",),
        collect,
    )  # fmt: skip


def _out_of_place(stack: Stack) -> tuple[Place, str] | None:
    """Return the `Place` whose rule a stack violates, and the frame that shows this; None if there is none."""
    for place in PLACES if stack.activity == "collective" else ():
        at = next((index for index, frame in enumerate(stack.frames) if place.inside.search(frame)), None)
        if at is None:
            continue
        outer = stack.frames[at + 1 :]
        below = next((index for index, frame in enumerate(outer) if place.below.search(frame)), None)
        if below is not None and not (place.unless and any(map(place.unless.search, outer[:below]))):
            return place, outer[below]
    return None


def _stands_still(stacks: Sequence[Stack]) -> bool:
    """Whether a rank has two stacks or more, and all of them show the program at the same place."""
    return len(stacks) > 1 and len({(stack.activity, program_frames(stack.frames, 6)) for stack in stacks}) == 1


def _lines(rows: Iterable[Sequence[Stack]]) -> list[str]:
    lasts = [stacks[-1] for stacks in rows][:MAX_LINES]
    return [
        f"Rank {stack.process.rank} is in {stack.detail}, at {program_frames(stack.frames, 3)} ({stack.source})"
        for stack in lasts
    ]
