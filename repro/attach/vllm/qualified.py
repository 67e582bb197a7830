"""Add to the verdict on a recorded vLLM's ranks what its engines were doing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from repro.attach.vllm.mirror import GROUP, LEFT_OUT, WITHOUT_REQUESTS
from repro.trace.witness.file import read_dir
from repro.verdict import Verdict
from repro.verdict.result import say

FROM_SCHEDULE = ("extra", "skipped", "order", "mismatch")
"""The causes that follow from a comparison with the declared schedule."""


def qualified(verdict: Verdict, root: Path) -> Verdict:
    """Return the verdict with the observations of the engines; unchanged if no rank has an engine.

    A rank whose engine waits for requests is no culprit, but a suspect. A rank that left a schedule that it declared
    from habit is a likely culprit: the others may do for the first time what is right.
    """
    witnesses = read_dir(root / "events")[0] if verdict.verdict != "clean" else {}
    if not any(group.name == GROUP for witness in witnesses.values() for group in witness.groups):
        return verdict
    left_out = {
        rank: text for rank, witness in witnesses.items() for text in witness.strings if text.startswith(LEFT_OUT)
    }
    lines = [f"rank {rank}: its {text}, which it had counted" for rank, text in sorted(left_out.items())]
    verdict = verdict.with_evidence(lines)
    if (
        verdict.cause in FROM_SCHEDULE
        and verdict.confidence == "certain"
        and not set(verdict.culprits) <= set(left_out)
    ):
        line = "the declared schedule of an execution is what the rank issued in earlier ones: vLLM declares none"
        verdict = replace(verdict.with_evidence([line]), confidence="likely")
    return _without_idle(verdict)


def _without_idle(verdict: Verdict) -> Verdict:
    """Turn culprits that wait for requests into suspects."""
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
