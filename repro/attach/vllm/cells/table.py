"""Write the outcomes of the cells (starts of vLLM) as a table, for a terminal and as Markdown.

Below the table, lines say which cells did not run, and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from repro.attach.vllm.cells.grid import Cell
from repro.attach.vllm.cells.outcome import NOT_RUN, Outcome
from repro.report.tables import cell as text_cell
from repro.report.tables import make_table
from repro.store.text import escape_control_characters
from repro.verdict.result import list_ranks

COLUMNS = (
    "layout", "gdn", "moe", "cache", "class", "culprit", "seconds", "silent", "collect", "bundle", "where",
)  # fmt: skip
MAX_WHERE = 160


def rows(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> list[tuple[str, ...]]:
    """Return a row for each cell that has started; a row has a text for each column in COLUMNS."""
    return [
        _row(cell, outcome)
        for cell in cells
        if (outcome := outcomes.get(cell.name)) is not None and outcome.state != NOT_RUN
    ]


def _row(cell: Cell, outcome: Outcome) -> tuple[str, ...]:
    kind = outcome.verdict + (f" ({outcome.cause})" if outcome.cause else "")
    seconds = f"{outcome.state} {outcome.seconds:.0f} s"
    silent = f"{outcome.silent_s:.0f} s"
    where = outcome.where if len(outcome.where) <= MAX_WHERE else f"{outcome.where[: MAX_WHERE - 1]}…"
    return (
        *cell.words()[:3], cache_words(cell, outcome), kind, list_ranks(outcome.culprits) or "-", seconds, silent,
        ", ".join(outcome.looked) or "-", outcome.bundles[0] if outcome.bundles else "-", where or "-",
    )  # fmt: skip


def cache_words(cell: Cell, outcome: Outcome) -> str:
    """Return what the table shows as the cache of a cell: "cold", "warm" or "partial".

    "partial" is a warm start with an incomplete cache: the cold start that filled the cache was ended before its server
    was ready.
    """
    return "partial" if outcome.partial else cell.cache


def terminal(found: Sequence[Sequence[str]]) -> Table:
    table = make_table(*COLUMNS, right=("seconds", "silent"))
    for row in found:
        table.add_row(*(text_cell(text) for text in row))
    return table


def markdown(found: Sequence[Sequence[str]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *found]
    return "\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in lines) + "\n"


def not_run(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return a line for each reason why cells did not run, with the names of these cells."""
    names: dict[str, list[str]] = {}
    for cell in cells:
        outcome = outcomes.get(cell.name)
        if outcome is None:
            names.setdefault("the experiment ended before them", []).append(cell.name)
        elif outcome.state == NOT_RUN:
            names.setdefault(outcome.reason, []).append(cell.name)
    return [f"not run ({len(group)}): {reason}: {' '.join(group)}" for reason, group in names.items()]


def _escaped(text: str) -> str:
    return escape_control_characters(text, 400).replace("|", "\\|")


def reasons(outcomes: Iterable[Outcome]) -> list[str]:
    """Return a line for each problem of the experiment itself that the outcomes have in ``notes``."""
    return [f"{outcome.name}: {note}" for outcome in outcomes for note in outcome.notes]
