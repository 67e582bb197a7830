"""Tables by rich, for a terminal and as plain lines."""

from __future__ import annotations

import io
from collections.abc import Collection

from rich.console import Console
from rich.table import Table
from rich.text import Text

from repro.store.text import escape_control_characters

_UNLIMITED = 10_000
"""More characters than any row has."""


def make_table(*columns: str, right: Collection[str] = (), header: bool = True) -> Table:
    """An empty table without lines between its cells. A cell that does not fit is folded, never cut.

    right: the columns that are aligned right, as numbers are
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=header)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def cell(text: str, style: str = "", limit: int = 400) -> Text:
    """A cell whose text is shown as it is: it is not markup, and nothing in it acts on the terminal."""
    return Text(escape_control_characters(text, limit), style)


def lines(table: Table) -> list[str]:
    """A table as plain text: a line for each row, without spaces at its end."""
    plain = Console(file=(text := io.StringIO()), width=_UNLIMITED, force_terminal=False, color_system=None)
    plain.print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def narrowest(console: Console, table: Table) -> int:
    """The width of a table, in characters, in which no word breaks."""
    return console.measure(table, options=console.options.update(max_width=_UNLIMITED)).minimum
