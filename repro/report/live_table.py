"""Show on a terminal where each rank of a live run is, in a table that is redrawn in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.live import Live
from rich.table import Table

from repro.report.tables import cell, make_table
from repro.trace.witness.file import Tail, Witness
from repro.trace.witness.format import Identity
from repro.trace.witness.parse import WitnessError
from repro.verdict.evidence.position import RankState, locate
from repro.verdict.result import list_ranks

REFRESH_S = 0.5

MOST_ROWS = 16
"""With more ranks than this, ranks that are in the same place share a row."""

_STYLES = {"building": "yellow", "locked": "yellow", "failed": "red", "done": "green"}


@dataclass(frozen=True)
class Row:
    """One rank in the table.

    phase_s   for how many seconds the rank has been in its phase; -1 if unknown
    place_s   for how many seconds the rank has been at the place that ``where`` names; -1 if unknown
    state     the rank's state, such as "building", which decides the colour of the row
    """

    rank: int
    phase: str = "-"
    phase_s: float = -1.0
    step: str = "-"
    where: str = "not started"
    place_s: float = -1.0
    state: str = ""


class LiveTable:
    """Redraws the ranks' positions twice a second.

    For this it reads whole witnesses, which is slow. No verdict depends on the table.

    here    this process and its host. It serves to convert times, because a rank on another host has another clock
    now_ns  returns the present time by the monotonic clock of this process's host
    """

    def __init__(self, title: str, live: Live, here: Identity, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._title = title
        self._live = live
        self._here = here
        self._now_ns = now_ns
        self._drawn_ns = 0

    def show(self, tails: list[Tail]) -> None:
        """Redraw the table, unless it was drawn less than REFRESH_S seconds ago.

        The watcher calls this whenever it has read the witnesses.

        tails: for each rank, the reader of its witness
        """
        if self._now_ns() - self._drawn_ns > REFRESH_S * 1e9:
            self._drawn_ns = self._now_ns()
            self._live.update(self.draw(tails), refresh=True)

    def draw(self, tails: list[Tail]) -> Table:
        """Return the table. A rank of the run that has not opened its witness yet also gets a row."""
        now_ns = self._now_ns()
        rows = {}
        for tail in tails:
            writer = tail.writer()
            rows[writer.rank] = row_of(tail, now_ns + writer.clock_ahead_ns(self._here))
        num_ranks = max((tail.writer().num_ranks for tail in tails), default=0)
        table = make_table("rank", "phase", "for", "step", "where", "for ", right=("rank", "for", "step", "for "))
        table.title, table.title_justify = self._title, "left"
        for ranks, row in _folded([rows.get(rank, Row(rank)) for rank in range(num_ranks)]):
            cells = (row.phase, _seconds(row.phase_s), row.step, row.where, _seconds(row.place_s))
            style = _STYLES.get(row.state, "")
            table.add_row(list_ranks(ranks), *(cell(text, style, limit=160) for text in cells))
        return table


def row_of(tail: Tail, now_ns: int) -> Row:
    """Return a rank's row in the table.

    tail: the reader of the rank's witness
    now_ns: the present time, by the monotonic clock of the rank's host
    """
    rank = tail.writer().rank
    try:
        witness = tail.witness()
    except (OSError, WitnessError):
        return Row(rank, where="witness cannot be read")
    if not tail.writer().pid:
        return Row(rank)
    if witness.last is None:
        return Row(rank, where="starting")
    state = locate(rank, witness, now_ns, None, "")
    at = state.position
    step = str(at.step) if at.step >= 0 else "-"
    phase_s = max(0, now_ns - _phase_began_ns(witness)) / 1e9
    return Row(rank, at.phase or "-", phase_s, step, where(state), at.since_s, at.state)


def where(state: RankState) -> str:
    """Say in a few words what a rank does."""
    at = state.position
    match at.state:
        case "blocked":
            return f"waits in {at.group} {at.op} #{at.seq} {at.layer}".rstrip()
        case "locked":
            return f"waits for lock {at.detail}"
        case "building":
            held = f", holds lock {', '.join(sorted(state.holds))}" if state.holds else ""
            return f"builds {at.detail}{held}"
        case "running":
            return at.detail or "computing"
        case "failed":
            return f"failed: {at.detail}"
        case other:
            return other


def _phase_began_ns(witness: Witness) -> int:
    """Return the time in ns of the oldest readable event of the rank's phase, which is usually the phase's begin."""
    phases, times = witness.column("phase"), witness.column("t_ns")
    index = len(phases) - 1
    while index > 0 and phases[index - 1] == phases[-1]:
        index -= 1
    return times[index]


def _folded(rows: list[Row]) -> list[tuple[list[int], Row]]:
    """Return, for each row of the table, (ranks of this row, row).

    With more than MOST_ROWS ranks, ranks with the same phase, step and place share a row. The shared row shows the
    longest times among these ranks.
    """
    if len(rows) <= MOST_ROWS:
        return [([row.rank], row) for row in rows]
    together: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        together.setdefault((row.phase, row.step, row.where), []).append(row)
    return [
        (
            [row.rank for row in group],
            Row(
                group[0].rank,
                group[0].phase,
                max(row.phase_s for row in group),
                group[0].step,
                group[0].where,
                max(row.place_s for row in group),
                group[0].state,
            ),
        )
        for group in together.values()
    ]


def _seconds(seconds: float) -> str:
    return "-" if seconds < 0 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
