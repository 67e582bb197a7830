"""The command line: parse the arguments, run the command, and turn errors into one line and an exit code.

Only the file of the command that the user calls is imported. So a command does not wait for other imports.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repro.commands.shared.errors import describe_failure, one_line, say_error
from repro.exit_codes import CANNOT_TELL, INTERRUPTED, USAGE
from repro.hosts.interrupt import Interrupt

COMMANDS = {
    "collect": "examine a job that hangs now, from outside, and diagnose it",
    "diagnose": "judge the dumps, stacks and logs that any torch.distributed job left",
    "record": "run a torch.distributed program, record its collectives, and explain it if it hangs",
    "watch": "print the verdict on a run directory, live or finished, or on a bundle",
    "report": "write report.html, timeline.svg and trace.json into runs",
    "bundle": "pack a run into one zip for a bug report, or check such a zip",
    "list": "list the scenarios, one per line",
    "run": "run a scenario and print its verdict",
    "matrix": "find whether layout, kernel backends or kernel cache make a start slow",
    "cells": "start vLLM in each combination of layout, backends and cache, and say which starts stall",
    "minimise": "shrink a scenario while it still hangs, and write it as one file",
    "clean": "remove the lab's runs whose processes have ended",
}
"""A dict from command to the purpose that --help prints. A command is in the file of this folder with its name."""


class Parser(argparse.ArgumentParser):
    """An argument parser that prints an error as one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> Any:
        print(f"{self.prog}: {one_line(message)}", file=sys.stderr)
        sys.exit(USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. An error is printed as one line; with HMR_DEBUG, also its traceback.

    USAGE         a setting or a file is wrong. For wrong arguments, SystemExit with this code is raised instead
    CANNOT_TELL   the command is not possible on this machine, or this program itself failed
    INTERRUPTED   the user interrupted the command
    """
    argv = sys.argv[1:] if argv is None else argv
    args, unknown = parser_of(argv).parse_known_args(argv)
    if unknown:
        from hybrid_moe_ref.config import nearest

        hint = nearest(unknown[0], args.parser._option_string_actions)
        args.parser.error(f"unknown argument {unknown[0]}{hint}")
    # argparse drops the value "--" of "--out=--"
    if emptied := [name for name, value in vars(args).items() if value == []]:
        args.parser.error(f"'--' is no value for {', '.join(emptied)}")
    args.interrupt = Interrupt()
    try:
        with args.interrupt.installed():
            code: int = args.command(args)
        return code
    except Exception as error:
        return explain(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def parser_of(argv: Sequence[str]) -> Parser:
    """Return the program's parser. It knows all commands, but only the arguments of the one that ``argv`` names."""
    name = Path(sys.argv[0]).name
    parser = Parser(
        prog=name if name == "hmr" else "python -m repro",
        description="Reproduce and explain the hangs of expert-parallel servers.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    called = next((word for word in argv if not word.startswith("-")), "")
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose)
        if name == called:
            module = importlib.import_module(f"repro.commands.{name}")
            module.add_arguments(command)
            command.set_defaults(command=module.run, parser=command)
    return parser


def explain(error: Exception) -> int:
    """Print an error as one line and return the exit code for this error."""
    # These imports take time, and a command that succeeds does not need them.
    from hybrid_moe_ref.config import ConfigError
    from hybrid_moe_ref.files import DamagedFile
    from repro.bundle import ArchiveError, LeakError
    from repro.lab.start.machine import CannotRunHere
    from repro.store.run_dir import OutputError
    from repro.trace.witness.parse import WitnessError

    match error:
        case ConfigError() | OutputError() | DamagedFile() | ArchiveError() | WitnessError():
            say_error(error, str(error))
            return USAGE
        case CannotRunHere() | LeakError():
            say_error(error, str(error))
        case OSError():  # for example, the disk became full during the run
            say_error(error, f"{error.filename or 'this machine'}: {error.strerror or error}")
        case _:
            say_error(error, describe_failure(error))
    return CANNOT_TELL
