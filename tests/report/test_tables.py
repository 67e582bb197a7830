"""The tables that commands print: whole in a pipe, folded on a narrow terminal, and inert against what they show."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.console import Console

from repro.report.terminal import overview, summary
from repro.verdict import Verdict
from repro.watch.document import describe

FAULT = describe(
    Verdict("deadlock", "skipped", (0, 6)), scenario="lock_across_collective", variant="fault", num_ranks=8,
    matches_expected=True,
)  # fmt: skip
CONTROL = msgspec.structs.replace(FAULT, variant="control", verdict="clean", cause=None, culprits=())


def printed(show, documents, width=80, terminal=False) -> list[str]:
    out = io.StringIO()
    show(Console(file=out, width=width, force_terminal=terminal, color_system=None), documents)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("show", [summary, overview])
def test_a_pipe_gets_each_row_as_one_plain_line_whatever_its_width(show):
    lines = printed(show, [CONTROL, FAULT], width=20)
    assert lines == printed(show, [CONTROL, FAULT], width=200)
    assert all(line == line.rstrip() and line.isascii() for line in lines), lines
    (row,) = [line for line in lines if "deadlock" in line]
    assert re.search(r"fault +deadlock,? +skipped +0,6 .*yes$", row), row


def test_a_terminal_of_60_columns_folds_cells_and_breaks_no_word():
    lines = printed(summary, [CONTROL, FAULT], width=60, terminal=True)
    assert all(len(line) <= 60 for line in lines), lines
    words = set(" ".join(lines).split())
    assert words >= {"control", "fault", "deadlock,", "skipped", "clean", "culprits", "0,6", "yes"}, lines


def test_a_table_that_fits_no_terminal_of_60_columns_is_left_to_the_terminal_to_wrap():
    lines = printed(overview, [CONTROL, FAULT], width=60, terminal=True)
    assert lines == printed(overview, [CONTROL, FAULT]), "as in a pipe"


@pytest.mark.parametrize("show", [summary, overview])
def test_many_culprits_are_counted_in_the_table(show):
    many = msgspec.structs.replace(FAULT, culprits=tuple(range(0, 512, 2)), num_ranks=512)
    assert any("0,2,4,… (256)" in line for line in printed(show, [CONTROL, many]))


@pytest.mark.parametrize("show", [summary, overview])
def test_a_name_that_looks_like_markup_or_moves_the_cursor_is_shown_as_it_is(show):
    hostile = msgspec.structs.replace(FAULT, variant="[red]a[/red]\x1b[2J")
    text = "\n".join(printed(show, [CONTROL, hostile]))
    assert "[red]a[/red]␛[2J" in text and "\x1b" not in text
