"""Remember the silences of a running job: periods in which most ranks waited for the same few ranks."""

from __future__ import annotations

from repro.hosts.system import STOPPED
from repro.verdict import Verdict
from repro.verdict.facts import Facts

SLOW_WINDOWS = 3
"""A run that ends well is `slow` if ranks waited for the same ranks for this many consecutive quiet windows."""

STARVED = 0.1
"""CPU-starvation threshold: share of time runnable but not running. Above it a silence proves nothing about the run."""


class Silences:
    """The longest silence for each set of awaited ranks."""

    def __init__(self) -> None:
        self._longest: dict[tuple[int, ...], tuple[float, Verdict]] = {}

    def remember(self, verdict: Verdict, facts: Facts, alive_s: float, quiet_window_s: float) -> None:
        """Remember a period in which a majority waited for a minority that was still working.

        A heartbeat ends such a period, except when the waiting ranks are blocked in a collective and all awaited ranks
        are building.

        alive_s   seconds since the last heartbeat of any rank
        """
        num_waiting = sum(position.state in ("blocked", "locked") for position in verdict.ranks)
        if verdict.verdict != "slow" or num_waiting <= len(verdict.culprits):
            return
        waited_s = _waited_for_a_build(verdict)
        if not waited_s:
            if alive_s < quiet_window_s or _was_starved(verdict, facts):
                return
            waited_s = verdict.quiet_s
        stopped = {
            rank for rank, why in facts.excused.items() if why == STOPPED
        }  # the rank was stopped from outside, so the run itself is not slow
        longest_s, _ = self._longest.get(verdict.culprits, (0.0, verdict))
        if waited_s > longest_s and not set(verdict.culprits) <= stopped:
            self._longest[verdict.culprits] = waited_s, verdict

    def slowest(self, quiet_window_s: float) -> Verdict | None:
        """The verdict of the longest silence, with the other long ones in its evidence; None if none was long."""
        silences = sorted(self._longest.values(), key=lambda silence: -silence[0])
        silences = [silence for silence in silences if silence[0] >= SLOW_WINDOWS * quiet_window_s]
        if not silences:
            return None
        (_, slowest), *others = silences
        also = [f"for {waited_s:.1f} s also: {other.evidence[0]}" for waited_s, other in others if other.evidence]
        return slowest.with_evidence(also)


def _waited_for_a_build(verdict: Verdict) -> float:
    """Return for how many seconds all blocked ranks have waited, if all awaited ranks are building; else 0."""
    awaited = [position for position in verdict.ranks if position.rank in verdict.culprits]
    if not awaited or any(position.state != "building" for position in awaited):
        return 0.0
    return min((position.since_s for position in verdict.ranks if position.state == "blocked"), default=0.0)


def _was_starved(verdict: Verdict, facts: Facts) -> bool:
    """Whether an awaited rank was short of CPU time, so that a busy machine made the others wait."""
    return any(facts.starved.get(rank, 0.0) >= STARVED for rank in verdict.culprits)
