"""Report early that ranks wait for a rank that builds: at a start, and before the quiet window has passed.

The judge is asked when no rank has recorded an event for the quiet window. A rank that builds one kernel after another
records events all the time, so the window may never pass while the others wait for it in a collective or for a lock.
"""

from __future__ import annotations

from repro.verdict import Verdict
from repro.verdict.result import Position, name_ranks, say

PATIENCE_S = 3.0
"""How long a rank must have waited in one place before the watcher asks who builds. A notice follows within 5 s."""

LOOK_S = 1.0
"""The shortest time between two looks; a look reads every witness."""

REPEAT_S = 30.0
"""How long a notice about the same ranks is not repeated, although what they build has changed."""


class BuildWaits:
    """Decides when to look, and what to report."""

    def __init__(self) -> None:
        self._next_ns = 0
        self._reported: tuple[tuple[int, ...], ...] = ()
        self._reported_ns = 0

    def due(self, now_ns: int, waiting_since_ns: int) -> bool:
        """Whether to look now. waiting_since_ns: when the rank that waits longest began to wait; 0 if none waits."""
        return bool(waiting_since_ns) and now_ns - waiting_since_ns >= PATIENCE_S * 1e9 and now_ns >= self._next_ns

    def looked(self, began_ns: int, now_ns: int) -> None:
        """Note a look. A look that takes long makes the next one later."""
        self._next_ns = now_ns + max(int(LOOK_S * 1e9), 10 * (now_ns - began_ns))

    def report(self, verdict: Verdict, now_ns: int) -> str:
        """Return the notice: builders, what they build, who waits for them, and since when; "" if there is no news."""
        awaited = {rank for wait in verdict.waits for rank in wait.awaited}
        builders = tuple(at.rank for at in verdict.ranks if at.state == "building" and at.rank in awaited)
        waiting = tuple(at.rank for at in verdict.ranks if at.state in ("blocked", "locked"))
        repeated = (builders, waiting) == self._reported and now_ns - self._reported_ns < REPEAT_S * 1e9
        if not builders or repeated:
            return ""
        self._reported, self._reported_ns = (builders, waiting), now_ns
        return f"slow: {describe_since(verdict)}"


def describe_since(verdict: Verdict) -> str:
    """Say where the ranks are and for how long, and who holds the locks that they wait for."""
    together: dict[str, list[Position]] = {}
    for at in verdict.ranks:
        together.setdefault(at.words(), []).append(at)
    parts = []
    for words, group in together.items():
        since = f" for {max(at.since_s for at in group):.0f} s" if group[0].state in _LASTING else ""
        parts.append(f"{say([at.rank for at in group], words)}{since}")
    for wait in verdict.waits:
        if wait.waits_in.startswith("lock ") and wait.awaited:
            parts.append(f"{name_ranks(wait.awaited)} {'hold' if len(wait.awaited) > 1 else 'holds'} {wait.waits_in}")
    return "; ".join(parts)


_LASTING = ("building", "blocked", "locked")
"""The states of which it is known when they began. A rank that runs outside collectives may have begun anything."""
