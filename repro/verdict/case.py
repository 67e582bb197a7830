"""All there is to judge by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from repro.trace.witness import Witness
from repro.verdict.facts import Facts
from repro.verdict.graph import Waits
from repro.verdict.ledger import Ledger
from repro.verdict.position import RankState
from repro.verdict.result import Finding, Verdict


@dataclass(frozen=True, slots=True)
class Case:
    """What was read, what the system said, and what follows from both."""

    witnesses: Mapping[int, Witness]
    rank_states: Mapping[int, RankState]
    ledger: Ledger
    waits: Waits
    quiet_s: float
    quiet_window_s: float
    notes: Sequence[str]
    facts: Facts
    queued: Collection[str]
    now_s: float  # on the clock of ``facts.died``

    @property
    def quiet(self) -> bool:
        return self.quiet_s >= self.quiet_window_s

    def ranks(self, *states: str) -> tuple[int, ...]:
        return tuple(rank for rank, rank_state in sorted(self.rank_states.items()) if rank_state.state in states)

    def place(self, rank: int) -> str:
        """Where a rank waits, in words."""
        node = self.waits.at.get(rank)
        return "outside any collective" if node is None else f"in {node.name}"

    def verdict(self, verdict: str, finding: Finding | None = None, **more: Any) -> Verdict:
        """A verdict with everything that does not depend on its class."""
        finding = finding or Finding()
        positions = tuple(self.rank_states[rank].position for rank in sorted(self.rank_states))
        evidence = [*more.pop("evidence", ()), *finding.evidence, *self.notes]
        found = Verdict(
            verdict,
            finding.cause,
            finding.culprits,
            finding.suspects,
            positions,
            finding.first_divergence,
            evidence=tuple(evidence),
            confidence=finding.confidence,
            quiet_s=self.quiet_s,
        )
        return replace(found, **more)
