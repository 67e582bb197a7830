"""The input of the judge's rules (`Case`): witnesses and facts, and what was derived from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repro.trace.knowledge import Knows
from repro.trace.witness.file import Witness
from repro.verdict.evidence.edges import list_waits
from repro.verdict.evidence.graph import Waits
from repro.verdict.evidence.ledger import Ledger
from repro.verdict.evidence.position import RankState
from repro.verdict.facts import Facts
from repro.verdict.result import Finding, Verdict


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that a rule may use to judge one run.

    witnesses       rank -> the rank's witness; damaged witnesses are left out
    rank_states     rank -> the rank's position, and what the wait-for graph needs to know about the rank
    ledger          the collectives of all ranks, matched by group and sequence number
    waits           the wait-for graph
    quiet_s         seconds from the last event of any rank to the moment that is judged
    quiet_window_s  a hang is reported only if ``quiet_s`` is at least this number of seconds
    notes           lines to add to the evidence, whatever the verdict is
    facts           what the operating systems say about the ranks' processes
    queued          names of the groups whose collectives are recorded as complete when the rank has queued them on its
                    device, as on NCCL
    now_s           the moment that is judged, in seconds on the same clock as the times in ``facts.died``
    """

    witnesses: Mapping[int, Witness]
    rank_states: Mapping[int, RankState]
    ledger: Ledger
    waits: Waits
    quiet_s: float
    quiet_window_s: float
    notes: Sequence[str]
    facts: Facts
    queued: Collection[str]
    now_s: float

    @property
    def quiet(self) -> bool:
        """Whether no rank has recorded an event during the quiet window. False if a witness has no times."""
        return self.quiet_s >= self.quiet_window_s and self.all_know(Knows.TIME)

    def needs_quiet(self, what: str) -> str:
        """Return a sentence that says why it is too early for the verdict ``what`` ("deadlock" or "stall")."""
        if not self.all_know(Knows.TIME):
            return (
                f"not every witness has times, so nothing shows how long the ranks have waited; a {what} is reported "
                "only after a quiet window"
            )
        return (
            f"the last event is {self.quiet_s:.3f} s old; a {what} is reported only after {self.quiet_window_s:g} s "
            "without any event"
        )

    def all_know(self, aspects: Knows) -> bool:
        """Whether every witness records these aspects of events, such as times or layers."""
        return all(aspects in witness.knows for witness in self.witnesses.values())

    def unknowing(self, ranks: Collection[int], aspects: Knows) -> list[int]:
        """Return the ranks of ``ranks`` whose witness lacks at least one of these aspects, such as times or layers."""
        return [rank for rank in ranks if rank in self.witnesses and aspects not in self.witnesses[rank].knows]

    def ranks(self, *states: str) -> tuple[int, ...]:
        """Return, in ascending order, the ranks whose state is one of ``states``, such as "dead" or "blocked"."""
        return tuple(rank for rank, rank_state in sorted(self.rank_states.items()) if rank_state.state in states)

    def place(self, rank: int) -> str:
        """Return where a rank is, as text: "in dp all_reduce #41", "in lock experts" or "outside any collective"."""
        node = self.waits.at.get(rank)
        return "outside any collective" if node is None else f"in {node.name}"

    def verdict(self, verdict: str, finding: Finding | None = None, **more: Any) -> Verdict:
        """Make a verdict of the class named ``verdict`` from the finding of a rule.

        finding   None counts as a finding without cause and culprits
        more      fields of `Verdict` that replace those of the finding. Only ``evidence`` does not replace: its lines
                  come before the evidence of the finding
        """
        finding = finding or Finding()
        positions = tuple(self.rank_states[rank].position for rank in sorted(self.rank_states))
        evidence = [*more.pop("evidence", ()), *finding.evidence, *self.notes]
        result = Verdict(
            verdict,
            finding.cause,
            finding.culprits,
            finding.suspects,
            positions,
            finding.first_divergence,
            waits=list_waits(self.waits, self.rank_states),
            evidence=tuple(evidence),
            confidence=finding.confidence,
            quiet_s=self.quiet_s,
        )
        return replace(result, **more)
