"""The command line: parse the arguments, run the command, and turn errors into one line and an exit code."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid_moe_ref.config import ConfigError, nearest
from hybrid_moe_ref.files import DamagedFile
from repro.bundle import ArchiveError, LeakError
from repro.commands import (
    CANNOT_TELL,
    EXPECTED,
    INTERRUPTED,
    USAGE,
    bundle,
    describe_failure,
    diagnose,
    exit_code,
    one_line,
    read_config,
    refuse_junit,
    report,
    run,
    say_error,
    watch,
    write_reports,
)
from repro.hosts import processes
from repro.hosts.interrupt import Interrupt
from repro.lab import scenarios
from repro.lab.configurations import CONFIGURATIONS
from repro.lab.rank.environment import refuse_bad_variables
from repro.lab.search import matrix, minimise
from repro.lab.start import job
from repro.lab.start.launch import CannotRunHere
from repro.lab.start.memory import refuse_too_large
from repro.report.junit import write_junit
from repro.report.terminal import say
from repro.store.run_dir import RUN_NAME, OutputError
from repro.trace.parse import WitnessError
from repro.trace.witness import read_dir


class Parser(argparse.ArgumentParser):
    """An argument parser that prints an error as one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        print(f"{self.prog}: {one_line(message)}", file=sys.stderr)
        sys.exit(USAGE)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    A user's error in arguments or files prints one line and returns USAGE. A failure of this program prints one line
    and returns CANNOT_TELL; with HMR_DEBUG set, the traceback is printed too.
    """
    args, unknown = _parser().parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0], args.parser._option_string_actions)
        args.parser.error(f"unknown argument {unknown[0]}{hint}")
    if emptied := [name for name, value in vars(args).items() if value == []]:  # argparse drops the "--" of "--out=--"
        args.parser.error(f"'--' is no value for {', '.join(emptied)}")
    args.interrupt = Interrupt()
    try:
        with args.interrupt.installed():
            refuse_bad_variables()
            code: int = args.command(args)
        return code
    except (ConfigError, OutputError, DamagedFile, ArchiveError, WitnessError) as error:
        say_error(error, str(error))
        return USAGE
    except (CannotRunHere, LeakError) as error:
        say_error(error, str(error))
    except OSError as error:  # for example, the disk became full during the run
        place = error.filename or "this machine"
        say_error(error, f"{place}: {error.strerror or error}")
    except Exception as error:
        say_error(error, describe_failure(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    return CANNOT_TELL


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m repro", description="Reproduce and explain the hangs of expert-parallel servers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    listing = commands.add_parser("list", help="list the scenarios, one per line")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=_list, parser=listing)

    run.add(commands)

    purpose = "find which of layout, kernel backends and kernel cache makes a start slow"
    grid = commands.add_parser("matrix", help=purpose)
    grid.add_argument("--seed", type=int, metavar="N", help="default: 0")
    grid.add_argument("--deadline", type=float, dest="deadline_s", metavar="S", help="default: 120")
    grid.add_argument(
        "--only", metavar="WORDS", default="", help='run only the cells with all these words, such as "TP8 jit cold"'
    )
    grid.add_argument("--config", type=Path, metavar="FILE", help="JSON with the keys of a run's config.json")
    grid.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    grid.add_argument("--launcher", choices=job.LAUNCHERS, default="fork", help="default: fork")
    grid.add_argument("--json", action="store_true", help="print the verdicts as a JSON list")
    grid.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    grid.add_argument("--script", action="store_true", help="print a shell script for vLLM on 8 GPUs, and run nothing")
    grid.set_defaults(command=_matrix, parser=grid)

    watch.add(commands)
    report.add(commands)
    diagnose.add(commands)
    bundle.add(commands)
    minimise.add(commands)

    clean = commands.add_parser("clean", help="remove the runs")
    clean.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    clean.add_argument("--json", action="store_true", help="print what was removed and what still runs")
    clean.set_defaults(command=_clean, parser=clean)
    return parser


def _list(args: argparse.Namespace) -> int:
    rows = []
    for scenario in map(scenarios.load, [*scenarios.names(), *CONFIGURATIONS]):
        faulty = scenarios.settings_of({"scenario": scenario.name, "variant": "fault"})
        rows.append({
            "name": scenario.name, "summary": scenario.summary, "source": scenario.source,
            "expected": scenario.expected(faulty).to_json(), "words": scenario.expected(faulty).words(),
        })  # fmt: skip
    if args.json:
        print(json.dumps([{key: row[key] for key in row if key != "words"} for row in rows], indent=1))
        return EXPECTED
    name_width, verdict_width = (max(len(str(row[key])) for row in rows) for key in ("name", "words"))
    for row in rows:
        print(f"{row['name']:{name_width}}  {row['words']:{verdict_width}}  {row['summary']} ({row['source']})")
    return EXPECTED


def _matrix(args: argparse.Namespace) -> int:
    if args.script:
        print(matrix.script(), end="")
        return EXPECTED
    document = read_config(args.config)
    flags = {name: value for name in ("seed", "deadline_s") if (value := getattr(args, name)) is not None}
    words = args.only.split()
    chosen = [
        (cell, cell.settings(document, flags))
        for cell in matrix.cells()
        if set(words) <= {cell.layout, cell.gdn, cell.moe, cell.cache}
    ]
    if not chosen:
        raise ConfigError(f"no cell has all of {args.only!r}", "--only")
    refuse_junit(args)
    if args.config:
        refuse_too_large([settings for _, settings in chosen])
    console = Console(stderr=args.json)

    interrupt: Interrupt = args.interrupt
    with job.launcher(args.launcher) as start:
        documents = matrix.run(
            chosen,
            args.out,
            interrupt,
            lambda line: say(console, line),
            start,
            lambda root: write_reports(console, [root]),
        )
    if args.junit:
        write_junit(args.junit, [{**document, "variant": matrix.name(document)} for document in documents])
    if args.json:
        print(json.dumps(documents, indent=1), flush=True)
    else:
        say(console, "\n".join(matrix.table(documents)))
    return INTERRUPTED if interrupt() else exit_code(documents)


def _clean(args: argparse.Namespace) -> int:
    """Remove the run directories whose processes have ended. Anything that is not certainly a run is left."""
    if not args.out.is_dir():
        raise ConfigError("no such folder", str(args.out))
    removed: list[str] = []
    running: list[str] = []
    for root in sorted(args.out.iterdir()):
        if root.is_symlink() or not RUN_NAME.fullmatch(root.name) or not (root / "config.json").is_file():
            continue
        witnesses, _ = read_dir(root / "events")
        if any(processes.find(witness.writer) for witness in witnesses.values()):
            running.append(str(root))
            print(f"repro: {root}: still runs, left as it is", file=sys.stderr)
            continue
        try:
            shutil.rmtree(root)
        except OSError as error:
            raise OutputError(f"cannot remove {root}: {error.strerror}") from error
        removed.append(str(root))
    latest = args.out / "latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
    if args.json:
        print(json.dumps({"removed": removed, "still_running": running}, indent=1))
    return EXPECTED
