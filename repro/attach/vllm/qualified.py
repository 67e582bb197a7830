"""What the engines of a recorded vLLM add to the verdict on its ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from repro.attach.vllm.mirror import WITHOUT_REQUESTS
from repro.attach.vllm.notes import Note, Notes, open_notes
from repro.verdict import Verdict
from repro.verdict.result import say

FROM_SCHEDULE = ("extra", "skipped", "order", "mismatch")
"""The causes that follow from a comparison with the declared schedule."""


def qualified(verdict: Verdict, root: Path, num_ranks: int) -> Verdict:
    """The verdict with what the engines noted; unchanged without engines.

    A rank whose engine waits for requests is no culprit, but a suspect. A rank that left a schedule that it declared
    from habit is a likely culprit: the others may do for the first time what is right.
    """
    notes = {rank: numbers for rank in range(num_ranks) if (numbers := open_notes(root, rank)) is not None}
    if verdict.verdict == "clean" or not notes:
        return verdict
    left_out = {rank for rank, numbers in notes.items() if numbers[Note.SKIPPED]}
    verdict = verdict.with_evidence(_left_out(rank, notes[rank]) for rank in sorted(left_out))
    if verdict.cause in FROM_SCHEDULE and verdict.confidence == "certain" and not set(verdict.culprits) <= left_out:
        line = "the declared schedule of an execution is what the rank issued in earlier ones: vLLM declares none"
        verdict = replace(verdict.with_evidence([line]), confidence="likely")
    return _without_idle(verdict)


def _without_idle(verdict: Verdict) -> Verdict:
    """The verdict whose culprits are not those that wait for requests."""
    asleep = {position.rank for position in verdict.ranks if position.phase == WITHOUT_REQUESTS}
    idle = sorted(asleep & set(verdict.culprits))
    if not idle:
        return verdict
    culprits = tuple(rank for rank in verdict.culprits if rank not in idle)
    line = f"{say(idle, 'wait')} for requests: no message of a request, or of the start of the others' work, has come"
    return replace(
        verdict.with_evidence([line]),
        culprits=culprits,
        suspects=tuple(sorted({*verdict.suspects, *idle})),
        confidence=verdict.confidence if culprits else "undecided",
    )


def _left_out(rank: int, notes: Notes) -> str:
    """The sentence on an engine that counted an execution and did not request it."""
    return (
        f"rank {rank}: its engine counted {notes[Note.COUNTED]} executions, and did not request execution "
        f"{notes[Note.FIRST]} from its worker"
    )
