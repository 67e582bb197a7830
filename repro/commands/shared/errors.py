"""Print errors as one line on standard error."""

from __future__ import annotations

import os
import sys
import traceback

from repro.store.text import escape_control_characters, short_site


def say_error(error: BaseException, text: str) -> None:
    """Print ``text`` as one line on standard error. If HMR_DEBUG is set, first print the traceback of ``error``."""
    if os.environ.get("HMR_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"repro: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Return an error text as one line: replace its line feeds and control characters, and shorten it if it is long."""
    return escape_control_characters(text.replace("\n", "\N{SYMBOL FOR LINE FEED}"), 4000)


def describe_failure(error: BaseException) -> str:
    """Format an error of this program itself as one line, which says that the user's run and files have no fault."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (
        f"internal error at {short_site(at.filename)}:{at.lineno}: {what}; this is a fault of repro, not of your run "
        "or files; set HMR_DEBUG=1 for the traceback"
    )
