"""The public commands, one file each: flags in, exit code out. This file holds what several commands share.

Exit codes: 0 the verdict is the expected one; 1 another verdict; 2 usage or configuration error; 125 inconclusive,
cannot run here, or a failure of this program; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_moe_ref.config import ConfigError
from repro.lab.settings import MAX_CONFIG_BYTES
from repro.lab.start import launch
from repro.report import write_all
from repro.report.terminal import overview, say, summary
from repro.store.run_dir import read_json, refuse_unwritable
from repro.store.text import escape_control_characters, short_site

EXPECTED, UNEXPECTED, USAGE, CANNOT_TELL, INTERRUPTED = 0, 1, 2, launch.CANNOT_TELL, 130


def exit_code(documents: Sequence[Mapping[str, Any]]) -> int:
    """The exit code for several verdicts: an unexpected verdict outweighs an inconclusive one."""
    missed = [document["verdict"] for document in documents if not document["matches_expected"]]
    if not missed:
        return EXPECTED
    return CANNOT_TELL if set(missed) == {"inconclusive"} else UNEXPECTED


def say_error(error: BaseException, text: str) -> None:
    """Print an error as one line on standard error; with HMR_DEBUG set, the traceback first."""
    if os.environ.get("HMR_DEBUG", "") not in ("", "0"):
        traceback.print_exception(error)
    print(f"repro: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """An error text as one line, whatever characters a path or an argument in it holds."""
    return escape_control_characters(text.replace("\n", "\N{SYMBOL FOR LINE FEED}"), 4000)


def describe_failure(error: BaseException) -> str:
    """A failure of this program as one line that says it is not the user's mistake."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (
        f"internal error at {short_site(at.filename)}:{at.lineno}: {what}; this is a fault of repro, not of your "
        "run or files; set HMR_DEBUG=1 for the traceback"
    )


def write_reports(console: Console, roots: Sequence[Path]) -> None:
    """Write the report of each run; each shows the other variants. A failure is printed, and the verdicts stay."""
    try:
        write_all(roots)
    except (OSError, ValueError) as error:
        say(console, f"  no report: {error}")
    except Exception as error:
        say_error(error, f"no report: {describe_failure(error)}")


def print_verdicts(console: Console, documents: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print the verdicts as JSON, or as a table with sentences below it."""
    if as_json:
        print(json.dumps(documents, indent=1))
    elif documents:
        show = overview if len({document["scenario"] for document in documents}) > 1 else summary
        show(console, documents)


def read_config(path: Path | None) -> Mapping[str, Any]:
    """Read the user's --config; {} without one. Raises ConfigError or DamagedFile."""
    if path is None:
        return {}
    try:
        document = read_json(path, MAX_CONFIG_BYTES)
    except OSError as error:
        raise ConfigError(f"cannot read the file: {error.strerror}", str(path)) from error
    if not isinstance(document, dict):
        raise ConfigError("wanted a mapping", str(path))
    return document


def refuse_junit(args: argparse.Namespace) -> None:
    """Raise OutputError for a --junit that cannot be written, before any run. Its folder --out may not exist yet."""
    if args.junit and (args.junit.parent.resolve() != args.out.resolve() or args.out.exists()):
        refuse_unwritable(args.junit, "; choose another --junit")
