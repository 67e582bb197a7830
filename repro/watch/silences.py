"""Remember the silences of a running job, because a run that finishes after long silences is `slow`, not `clean`.

A silence is a period without events, in which some ranks work and the other ranks wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from repro.hosts.system import STOPPED
from repro.verdict import Verdict
from repro.verdict.facts import Facts

SLOW_WINDOWS = 3
"""A run whose ranks all finish is `slow` if ranks waited for the same ranks for at least this many quiet windows."""


@dataclass
class _Silence:
    """A period without events that has not ended. The awaited ranks are those for which the other ranks wait.

    lasted_s   for how many seconds it has lasted
    starved_s  for how many of these seconds the awaited ranks lacked a processor
    share      for which share of the time, 0 to 1, an awaited rank lacked a processor at the last measurement. If there
               are several awaited ranks, the largest share
    """

    lasted_s: float = 0.0
    starved_s: float = 0.0
    share: float = 0.0

    def go_on(self, lasted_s: float) -> float:
        """Extend the silence to ``lasted_s`` seconds.

        Return for how many of the added seconds the awaited ranks (those for which the others wait) had a processor,
        by the one of them that lacked it most.
        """
        added_s, self.lasted_s = lasted_s - self.lasted_s, lasted_s
        self.starved_s += self.share * added_s
        return (1 - self.share) * added_s


class Silences:
    """Remembers, for each set of awaited ranks, the longest silence in which the other ranks waited for them."""

    def __init__(self) -> None:
        self._longest: dict[tuple[int, ...], tuple[float, Verdict]] = {}
        self._now: dict[tuple[int, ...], _Silence] = {}
        self._kept: tuple[int, ...] | None = None

    def remember(self, verdict: Verdict, facts: Facts, alive_s: float, quiet_window_s: float) -> None:
        """Remember for how many seconds ranks have waited for the culprits of a `slow` verdict ("awaited ranks").

        If all awaited ranks build a kernel, this is the time for which all blocked ranks have waited. Otherwise it is
        the length of the silence, less the time in which the awaited ranks lacked a processor. That time is subtracted
        because the machine was busy then, so the job itself was not slow.

        In each of these cases, nothing is remembered:

        - The verdict is not `slow`, or fewer ranks wait than are awaited.
        - All awaited ranks are suspended (by SIGSTOP or a debugger).
        - A longer wait for the same ranks is already known.
        - A rank has sent a heartbeat in the last quiet window, and not all awaited ranks build a kernel.

        alive_s   seconds since the last heartbeat of any rank
        """
        self._kept = None
        num_waiting = sum(position.state in ("blocked", "locked") for position in verdict.ranks)
        if verdict.verdict != "slow" or num_waiting < len(verdict.culprits):
            return
        lost_s = self._lost_s(verdict, facts)
        waited_s = _waited_for_a_build(verdict)
        if not waited_s:
            if alive_s < quiet_window_s:
                return
            waited_s = verdict.quiet_s - lost_s
        stopped = {
            rank for rank, why in facts.excused.items() if why == STOPPED
        }  # the rank was stopped from outside, so the run itself is not slow
        longest_s, _ = self._longest.get(verdict.culprits, (0.0, verdict))
        if waited_s > longest_s and not set(verdict.culprits) <= stopped:
            self._longest[verdict.culprits] = waited_s, verdict
            self._kept = verdict.culprits

    def go_on(self, quiet_s: float) -> None:
        """Extend the silence that was remembered last. quiet_s: for how many seconds no rank has recorded an event."""
        if self._kept is not None and quiet_s > (silence := self._now[self._kept]).lasted_s:
            waited_s, verdict = self._longest[self._kept]
            self._longest[self._kept] = waited_s + silence.go_on(quiet_s), verdict

    def _lost_s(self, verdict: Verdict, facts: Facts) -> float:
        """Return for how many seconds of the silence the awaited ranks, the verdict's culprits, lacked a processor.

        ``facts.starved`` has the share of the time since the last measurement in which a rank lacked a processor. This
        share is taken for the whole time since the previous call, or since the silence began.
        """
        silence = self._now.get(verdict.culprits, _Silence())
        if verdict.quiet_s < silence.lasted_s:
            silence = _Silence()
        silence.share = min(1.0, max((facts.starved.get(rank, 0.0) for rank in verdict.culprits), default=0.0))
        silence.go_on(verdict.quiet_s)
        self._now = {verdict.culprits: silence}
        return silence.starved_s

    def slowest(self, quiet_window_s: float) -> Verdict | None:
        """Return the `slow` verdict of the longest silence; None if no silence was long enough for such a verdict.

        A silence is long enough if it lasted at least SLOW_WINDOWS quiet windows. The verdict has a line of evidence
        for each other silence that is long enough.
        """
        silences = sorted(self._longest.values(), key=lambda silence: -silence[0])
        silences = [silence for silence in silences if silence[0] >= SLOW_WINDOWS * quiet_window_s]
        if not silences:
            return None
        (_, slowest), *others = silences
        also = [f"another wait of {long_s:.1f} s: {other.evidence[0]}" for long_s, other in others if other.evidence]
        return slowest.with_evidence(also)


def _waited_for_a_build(verdict: Verdict) -> float:
    """Return for how many seconds all blocked ranks have waited for the culprits; 0 if a culprit builds no kernel."""
    awaited = [position for position in verdict.ranks if position.rank in verdict.culprits]
    if not awaited or any(position.state != "building" for position in awaited):
        return 0.0
    return min((position.since_s for position in verdict.ranks if position.state == "blocked"), default=0.0)
