"""What the engines of a recorded vLLM add to the verdict on its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from repro.attach.vllm.mirror import WITHOUT_REQUESTS
from repro.attach.vllm.notes import Note, open_notes
from repro.verdict import Verdict
from repro.verdict.result import say


def qualified(verdict: Verdict, root: Path, num_ranks: int) -> Verdict:
    """The verdict with what the engines noted. A rank whose engine waits for requests is no culprit, but a suspect."""
    if verdict.verdict == "clean":
        return verdict
    verdict = verdict.with_evidence(_left_out(root, num_ranks))
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


def _left_out(root: Path, num_ranks: int) -> Iterator[str]:
    """A sentence for each engine that counted an execution and did not request it."""
    for rank in range(num_ranks):
        notes = open_notes(root, rank)
        if notes is not None and notes[Note.SKIPPED]:
            yield (
                f"rank {rank}: its engine counted {notes[Note.COUNTED]} executions, and did not request execution "
                f"{notes[Note.FIRST]} from its worker"
            )
