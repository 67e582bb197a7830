"""The lines that a watcher prints while it watches: which ranks wait for which, and which rank builds a kernel.

Usually the watcher calls the judge when no rank has recorded an event for the quiet window. But a rank that builds one
kernel after another records an event for each build, so the quiet window never passes, although other ranks wait for
this rank. Therefore, if a rank has waited for PATIENCE_S, the watcher checks for builds without a quiet window.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from repro.verdict import Verdict
from repro.verdict.result import Position, name_ranks, say

PATIENCE_S = 3.0
"""How long a rank must have waited in one place before the watcher checks whether another rank builds a kernel."""

CHECK_S = 1.0
"""The shortest time between two checks for builds. A check reads every witness, so it costs time."""

REPEAT_S = 30.0
"""The shortest time between two notices about the same builders and waiting ranks, even if the build has changed."""


class Notices:
    """Decides which lines a watcher prints, so that no line is printed again and again.

    notice          prints a line
    remark          returns a line about a verdict that is not final, or "" for no line. Equal lines are printed once
    quiet_window_s  the quiet window: the caller calls `silence` when no rank has recorded an event for this long
    """

    def __init__(self, notice: Callable[[str], None], remark: Callable[[Verdict], str], quiet_window_s: float) -> None:
        self._notice, self._remark, self._quiet_window_s = notice, remark, quiet_window_s
        self._remarks: set[str] = set()
        self._waits: list[str] = []
        self._next_check_ns = 0
        self._builds: tuple[tuple[int, ...], ...] = ()
        self._builds_ns = 0

    def silence(self, verdict: Verdict) -> None:
        """Print what is new after a quiet window: a remark about the verdict, and which ranks wait for which.

        The remark is the line that the function ``remark`` of this object returns for the verdict. It is printed if it
        was never printed before. The waits are printed if two things are true: they have changed since they were last
        printed, and a rank has waited for at least half a quiet window.

        verdict: the judgement after this quiet window
        """
        if (remark := self._remark(verdict)) and remark not in self._remarks:
            self._remarks.add(remark)
            self._notice(remark)
        waits_s = [at.since_s for at in verdict.ranks if at.state in ("blocked", "locked")]
        news = _news(verdict)
        if max(waits_s, default=0.0) >= self._quiet_window_s / 2 and news != self._waits:
            self._waits = news
            self._notice(f"{verdict.verdict}: {describe_since(verdict)}")

    def is_build_check_due(self, now_ns: int, waiting_since_ns: int) -> bool:
        """Whether the watcher should now check which rank builds a kernel.

        True if a rank has waited for at least PATIENCE_S, and the last check was long enough ago (see `builds`).

        waiting_since_ns: when the rank that waits longest began to wait; 0 if no rank waits
        """
        waited_ns = now_ns - waiting_since_ns if waiting_since_ns else 0
        return waited_ns >= PATIENCE_S * 1e9 and now_ns >= self._next_check_ns

    def builds(self, verdict: Verdict, began_ns: int, now_ns: int) -> None:
        """Print which ranks build a kernel, which ranks wait for them, and for how long. Set when to check again.

        Call this after each check for builds (see `is_build_check_due`). Print nothing if no rank waits for a rank that
        builds. Also print nothing if the last notice about builds named the same ranks, and was printed less than
        REPEAT_S seconds ago.

        verdict: the judgement that the check made
        began_ns, now_ns: when the check began and ended. The longer it took, the later the next check is due
        """
        self._next_check_ns = now_ns + max(int(CHECK_S * 1e9), 10 * (now_ns - began_ns))
        awaited = {rank for wait in verdict.waits for rank in wait.awaited}
        builders = tuple(at.rank for at in verdict.ranks if at.state == "building" and at.rank in awaited)
        waiting = tuple(at.rank for at in verdict.ranks if at.state in ("blocked", "locked"))
        repeated = (builders, waiting) == self._builds and now_ns - self._builds_ns < REPEAT_S * 1e9
        if builders and not repeated:
            self._builds, self._builds_ns, self._waits = (builders, waiting), now_ns, _news(verdict)
            self._notice(f"slow: {describe_since(verdict)}")


def _news(verdict: Verdict) -> list[str]:
    """Return the sentences about the ranks' positions, without the ages of heartbeats, because these always change.

    The watcher prints waits only if this result is not the same as at the last notice.
    """
    return [re.sub(r"heartbeat [\d.]+ s ago", "", sentence) for sentence in verdict.sentences()]


def describe_since(verdict: Verdict) -> str:
    """Return a line that says where each rank is, and which ranks hold the locks that others wait for.

    For ranks that build or wait, the line also says for how long.
    """
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
"""The states of a rank for which the witness shows when they began. For a rank that computes, it does not show this."""
