"""``cells``: start vLLM in each combination of layout, kernel backends and kernel cache, and say which starts stall."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from hybrid_moe_ref.config import ConfigError
from repro.attach.vllm.cells import grid, hypotheses, outcome, table
from repro.attach.vllm.cells.experiment import Experiment, Settings
from repro.attach.vllm.cells.machine import Machine
from repro.exit_codes import CANNOT_TELL, EXPECTED, INTERRUPTED, UNEXPECTED
from repro.report.terminal import print_table, say

WINDOW_S = 120.0
LIMIT_S = 3600.0
NEEDED_GB = 20.0
LONGEST_S = 86400.0
LARGEST_GB = 1e6
MOST_RANKS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=grid.REPORT_MODEL, help=f"name or folder; default: {grid.REPORT_MODEL}")
    parser.add_argument("--ranks", type=int, default=8, metavar="N", help="number of GPUs or CPU ranks; default: 8")
    parser.add_argument(
        "--eager", action="store_true", help="also run the cells of the second command in vllm#41862 (--enforce-eager)"
    )
    parser.add_argument(
        "--only", default="", metavar="WORDS", help='run only cells with all these words: "DP8+EP8 jit cold"'
    )
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="a new folder, or that of an earlier call; default: runs/<utc>-cells"
    )
    parser.add_argument(
        "--silence",
        type=float,
        default=WINDOW_S,
        metavar="S",
        help="run collect after S seconds without an event; default: 120",
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help="end a server after S seconds; default: 3600"
    )
    parser.add_argument(
        "--needs", type=float, default=NEEDED_GB, metavar="GB", help="free disk space that a start needs; default: 20"
    )
    parser.add_argument(
        "--vllm", default="vllm serve", metavar="COMMAND", help='command that starts a server; default: "vllm serve"'
    )
    parser.add_argument(
        "--list", action="store_true", help="print each cell, or why it cannot start on this machine, and exit"
    )
    parser.add_argument("--json", action="store_true", help="print the outcomes as JSON")
    parser.add_argument(
        "flags", nargs="*", default=(), metavar="-- FLAG…", help="flags of vLLM, instead of those in vllm#41862"
    )


def run(args: argparse.Namespace) -> int:
    """Start vLLM once for each cell. With --list, only print the cells and return 0.

    Returns 0 if every server that started became ready without a stall, 1 if at least one did not, 125 if no cell could
    start, and INTERRUPTED after Ctrl-C.
    """
    settings = _settings(args)
    machine = Machine.here()
    cells = grid.matching(grid.all_cells(args.ranks, args.eager, on_a_cpu=not machine.gpus), args.only)
    if not cells:
        raise ConfigError(f"no cell has all the words of {args.only!r}; --list prints the cells", "--only")
    console = Console(stderr=args.json)
    if args.list:
        for cell in cells:
            say(console, f"{cell.name}: {machine.why_not(cell) or shlex.join(cell.flags())}")
        return EXPECTED
    if args.vllm == "vllm serve":
        _refuse_without_vllm(machine)
    root = args.to or Path("runs") / f"{datetime.now(UTC):%Y%m%dT%H%M%S}Z-cells"
    for line in machine.notes():
        say(console, f"note: {line}")
    experiment = Experiment(root, settings, machine, cells, args.interrupt, lambda text: say(console, text))
    with args.interrupt.deferred():
        outcomes = experiment.run()
        if args.json:
            print(json.dumps([asdict(each) for each in outcomes.values()], indent=1), flush=True)
        else:
            _print(console, experiment, outcomes)
    if args.interrupt():
        say(console, f"interrupted; go on with: --to {root}")
        return INTERRUPTED
    started = [each for each in outcomes.values() if each.state != outcome.NOT_RUN]
    if not started:
        return CANNOT_TELL
    return EXPECTED if all(each.verdict == "clean" for each in started) else UNEXPECTED


def _settings(args: argparse.Namespace) -> Settings:
    for name, most in (("silence", LONGEST_S), ("limit", LONGEST_S), ("needs", LARGEST_GB)):
        if not 0 < getattr(args, name) <= most:
            raise ConfigError(f"{getattr(args, name)} is not a number above 0 and up to {most:,.0f}", f"--{name}")
    if not 1 <= args.ranks <= MOST_RANKS:
        raise ConfigError(f"{args.ranks} is not a number of ranks in 1..{MOST_RANKS}", "--ranks")
    try:
        program = tuple(shlex.split(args.vllm))
    except ValueError as error:
        raise ConfigError(f"cannot split the command into words: {error}", "--vllm") from None
    if not program:
        raise ConfigError("no command is given", "--vllm")
    flags = tuple(args.flags) or grid.REPORT_FLAGS
    return Settings(program, args.model, flags, args.silence, args.limit, int(args.needs * 1e9))


def _refuse_without_vllm(machine: Machine) -> None:
    if not machine.vllm:
        raise ConfigError("this Python has no vLLM: run this command with the Python of vLLM's environment", "--vllm")
    if not machine.recorder:
        raise ConfigError(
            "vLLM would not find the recorder: pip install this project into vLLM's environment", "--vllm"
        )


def _print(console: Console, experiment: Experiment, outcomes: dict[str, outcome.Outcome]) -> None:
    say(console, "")
    print_table(console, table.terminal(table.rows(experiment.cells, outcomes)))
    for line in (
        *table.not_run(experiment.cells, outcomes),
        *hypotheses.remaining(experiment.cells, outcomes),
        *table.reasons(outcomes.values()),
    ):
        say(console, line)
    say(console, f"tables, recordings and bundles: {os.path.relpath(experiment.root)}")
