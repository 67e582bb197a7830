"""What `run` and `matrix` share: flags that are not settings of a run, and the check of the --junit file."""

from __future__ import annotations

import argparse
from pathlib import Path

from repro.lab.start.job import LAUNCHERS
from repro.store.run_dir import refuse_unwritable


def add_arguments(parser: argparse.ArgumentParser, launcher_help: str) -> None:
    """Add the flags that are not settings of a run, such as --json.

    launcher_help: which launcher the command uses by default, for the help text of --launcher
    """
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings as JSON, with the keys of a run's config.json"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.add_argument("--launcher", choices=LAUNCHERS, help=f"default: {launcher_help}")
    parser.add_argument("--json", action="store_true", help="print the verdicts as a JSON list")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")


def refuse_junit(args: argparse.Namespace) -> None:
    """Raise OutputError if the --junit file cannot be written. Call this before the first run starts.

    A file in the --out folder is accepted even if this folder does not exist yet: the first run creates the folder.
    """
    if args.junit and (args.junit.parent.resolve() != args.out.resolve() or args.out.exists()):
        refuse_unwritable(args.junit, "; choose another --junit")
