"""Weaken a verdict for reasons outside the witnesses: an interrupt, an ended launcher, or tokens not compared."""

from __future__ import annotations

import dataclasses

from repro.verdict import Verdict
from repro.verdict.classes import END, INTERRUPT, class_of


def not_decided(verdict: Verdict) -> Verdict:
    """Weaken the verdict on a run that the user interrupted: `slow` becomes `inconclusive`.

    Some ranks were still at work at the interrupt, but this does not prove that the run is slow.
    """
    if INTERRUPT in class_of(verdict.verdict).outside:
        verdict = dataclasses.replace(verdict, verdict="inconclusive", culprits=(), confidence="undecided")
    return verdict.with_evidence(["the run was interrupted before it was decided"])


def ended_from_outside(verdict: Verdict, why: str) -> Verdict:
    """Weaken the verdict on a run whose launcher got a signal: `slow` and `crash` become `inconclusive`.

    The launcher ended the ranks because of the signal, so their deaths are not the cause. why: a line about the signal.
    """
    if END in class_of(verdict.verdict).outside:
        verdict = dataclasses.replace(
            verdict, verdict="inconclusive", cause="", culprits=(), suspects=(), confidence="undecided"
        )
    return verdict.with_evidence([why])


def uncompared(verdict: Verdict, why: str) -> Verdict:
    """Weaken the verdict on a run whose tokens were not compared with the reference: `clean` becomes `inconclusive`.

    why: the reason why they were not compared.
    """
    if verdict.verdict == "clean":
        verdict = dataclasses.replace(verdict, verdict="inconclusive", confidence="undecided")
    return verdict.with_evidence([f"{why}, so the tokens were not compared"])
