"""The result of comparing a run's tokens with those of the reference model, for the watcher or a later judgement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """The result of comparing the tokens of a run with the tokens of the reference model, when all ranks are done.

    wrong     a line for each wrong result
    missing   why the tokens were not compared; "" if they were compared
    evidence  a sentence that says what was compared: "70 tokens of 13 requests equal the reference's"
    """

    wrong: tuple[str, ...] = ()
    missing: str = ""
    evidence: str = ""
