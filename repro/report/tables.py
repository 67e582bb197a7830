"""Make tables with the package rich, for a terminal or as plain lines."""

from __future__ import annotations

import io
from collections.abc import Collection

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repro.store.text import escape_control_characters

_UNLIMITED = 10_000
"""A width in characters that is larger than any row."""


def make_table(*columns: str, right: Collection[str] = (), header: bool = True) -> Table:
    """Make an empty table without lines between cells. Long cells are folded, never cut.

    columns: the names of the columns
    right: the names of the columns that are aligned right, usually columns of numbers
    header: whether the table shows the names of its columns
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=header)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def cell(text: str, style: str = "", limit: int = 400) -> Text:
    """Make a cell that shows its text literally: no markup, and no terminal escapes.

    style: a style of rich, such as "bold red"; limit: the largest number of characters to show
    """
    return Text(escape_control_characters(text, limit), style)


def lines(table: Table) -> list[str]:
    """Format a table as plain text: one line per row, without trailing spaces."""
    plain = Console(file=(text := io.StringIO()), width=_UNLIMITED, force_terminal=False, color_system=None)
    plain.print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def narrowest(console: Console, table: Table) -> int:
    """Return the smallest width of a table, in characters, at which no word is broken."""
    return console.measure(table, options=console.options.update(max_width=_UNLIMITED)).minimum
