"""Weaken a verdict for reasons outside the witnesses: an interrupt, an ended launcher, or a missing comparison."""

from __future__ import annotations

import dataclasses

from repro.verdict import Verdict
from repro.verdict.classes import END, INTERRUPT, class_of


def not_decided(verdict: Verdict) -> Verdict:
    """Weaken the verdict on an interrupted run: that ranks were still at work then does not make the run slow."""
    if INTERRUPT in class_of(verdict.verdict).outside:
        verdict = dataclasses.replace(verdict, verdict="inconclusive", culprits=(), confidence="undecided")
    return verdict.with_evidence(["the run was interrupted before it was decided"])


def ended_from_outside(verdict: Verdict, why: str) -> Verdict:
    """Weaken the verdict on a run whose launcher got a signal and ended the ranks: their deaths are not the cause."""
    if END in class_of(verdict.verdict).outside:
        verdict = dataclasses.replace(
            verdict, verdict="inconclusive", cause="", culprits=(), suspects=(), confidence="undecided"
        )
    return verdict.with_evidence([why])


def uncompared(verdict: Verdict, why: str) -> Verdict:
    """Weaken the verdict `clean` on a run whose tokens were not compared with the reference. why: the reason."""
    if verdict.verdict == "clean":
        verdict = dataclasses.replace(verdict, verdict="inconclusive", confidence="undecided")
    return verdict.with_evidence([f"{why}, so the tokens were not compared"])
