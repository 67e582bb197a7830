"""What a watcher prints while it watches: which ranks wait for which, and early, which rank builds.

The judge is asked when no rank has recorded an event for the quiet window. A rank that builds one kernel after another
records events all the time, so the window may never pass while the others wait for it in a collective or for a lock.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from repro.verdict import Verdict
from repro.verdict.result import Position, name_ranks, say

PATIENCE_S = 3.0
"""How long a rank must have waited in one place before the watcher asks who builds. A notice follows within 5 s."""

LOOK_S = 1.0
"""The shortest time between two looks; a look reads every witness."""

REPEAT_S = 30.0
"""How long a notice about the same ranks is not repeated, although what they build has changed."""


class Notices:
    """Decides what is news.

    notice          called with each line
    remark          what the job itself has to say of a verdict that is not final, or ""; it is printed once
    quiet_window_s  how long no rank has recorded an event when `silence` is called
    """

    def __init__(self, notice: Callable[[str], None], remark: Callable[[Verdict], str], quiet_window_s: float) -> None:
        self._notice, self._remark, self._quiet_window_s = notice, remark, quiet_window_s
        self._remarks: set[str] = set()
        self._waits: list[str] = []
        self._next_look_ns = 0
        self._builds: tuple[tuple[int, ...], ...] = ()
        self._builds_ns = 0

    def silence(self, verdict: Verdict) -> None:
        """Report the waits between ranks if they have changed. A wait that has begun after the silence is none."""
        if (remark := self._remark(verdict)) and remark not in self._remarks:
            self._remarks.add(remark)
            self._notice(remark)
        waits_s = [at.since_s for at in verdict.ranks if at.state in ("blocked", "locked")]
        news = _news(verdict)
        if max(waits_s, default=0.0) >= self._quiet_window_s / 2 and news != self._waits:
            self._waits = news
            self._notice(f"{verdict.verdict}: {describe_since(verdict)}")

    def looks_for_builds(self, now_ns: int, waiting_since_ns: int) -> bool:
        """Whether to look who builds. waiting_since_ns: when the longest wait of a rank began; 0 if none waits."""
        waited_ns = now_ns - waiting_since_ns if waiting_since_ns else 0
        return waited_ns >= PATIENCE_S * 1e9 and now_ns >= self._next_look_ns

    def builds(self, verdict: Verdict, began_ns: int, now_ns: int) -> None:
        """Report builders, what they build, who waits for them, and since when, if the ranks are news.

        began_ns, now_ns: when the look began and ended. A look that takes long makes the next one later.
        """
        self._next_look_ns = now_ns + max(int(LOOK_S * 1e9), 10 * (now_ns - began_ns))
        awaited = {rank for wait in verdict.waits for rank in wait.awaited}
        builders = tuple(at.rank for at in verdict.ranks if at.state == "building" and at.rank in awaited)
        waiting = tuple(at.rank for at in verdict.ranks if at.state in ("blocked", "locked"))
        repeated = (builders, waiting) == self._builds and now_ns - self._builds_ns < REPEAT_S * 1e9
        if builders and not repeated:
            self._builds, self._builds_ns, self._waits = (builders, waiting), now_ns, _news(verdict)
            self._notice(f"slow: {describe_since(verdict)}")


def _news(verdict: Verdict) -> list[str]:
    """What is said of the ranks, without what changes while nothing happens."""
    return [re.sub(r"heartbeat [\d.]+ s ago", "", sentence) for sentence in verdict.sentences()]


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
