"""``matrix``: find which of layout, kernel backends and kernel cache makes a start slow."""

from __future__ import annotations

import argparse
import json

from msgspec import structs
from rich.console import Console

from hybrid_moe_ref.config import ConfigError
from repro.commands.shared import lab
from repro.commands.shared.verdicts import exit_code, write_reports
from repro.exit_codes import INTERRUPTED
from repro.lab import flags
from repro.lab.rank.environment import refuse_bad_variables
from repro.lab.search import matrix
from repro.lab.start import job
from repro.lab.start.machine import require_model
from repro.lab.start.memory import refuse_too_large
from repro.lab.start.series import Series
from repro.report.junit import write_junit
from repro.report.terminal import print_table, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flags.add_flags(parser, "seed", "deadline_s")
    parser.add_argument(
        "--only",
        metavar="WORDS",
        default="",
        help='run only the cells whose names have all these words, such as "TP8 jit cold"',
    )
    lab.add_arguments(parser, launcher_help="fork")


def run(args: argparse.Namespace) -> int:
    """Run the cells and print the table of their verdicts.

    Returns the exit code for all verdicts together, or INTERRUPTED after Ctrl-C.
    """
    refuse_bad_variables()
    document = flags.read_config(args.config)
    words = set(args.only.split())
    chosen = [
        (cell, cell.settings(document, flags.given(args)))
        for cell in matrix.cells()
        if words <= {cell.layout, cell.gdn, cell.moe, cell.cache}
    ]
    if not chosen:
        raise ConfigError(f"no cell has all the words of {args.only!r} in its name", "--only")
    lab.refuse_junit(args)
    require_model()
    if args.config:
        refuse_too_large([settings for _, settings in chosen])
    console = Console(stderr=args.json)
    with job.launcher(args.launcher or "fork") as start:
        results = matrix.run(
            chosen,
            Series(args.out, start, args.interrupt),
            lambda line: say(console, line),
            lambda root: write_reports(console, [root]),
        )
    if args.junit:
        write_junit(args.junit, [structs.replace(each.verdict, variant=each.cell.name()) for each in results])
    if args.json:
        print(json.dumps([result.to_json() for result in results], indent=1), flush=True)
    else:
        for title, table in matrix.tables(results):
            say(console, f"\n{title}")
            print_table(console, table)
    return INTERRUPTED if args.interrupt() else exit_code([result.verdict for result in results])
