"""Errors as one line on standard error."""

from __future__ import annotations

import os
import sys
import traceback

from repro.store.text import escape_control_characters, short_site


def say_error(error: BaseException, text: str) -> None:
    """Print an error as one line on standard error; with HMR_DEBUG set, the traceback first."""
    if os.environ.get("HMR_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"repro: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """Return an error text as one line, whatever characters a path or an argument in it contains."""
    return escape_control_characters(text.replace("\n", "\N{SYMBOL FOR LINE FEED}"), 4000)


def describe_failure(error: BaseException) -> str:
    """Format a failure of this program as one line, which says that the user did nothing wrong."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (
        f"internal error at {short_site(at.filename)}:{at.lineno}: {what}; this is a fault of repro, not of your run "
        "or files; set HMR_DEBUG=1 for the traceback"
    )
