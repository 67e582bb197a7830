"""``minimise SCENARIO``: shrink a scenario while its verdict stays the same, and write the result as one file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from repro.exit_codes import CANNOT_TELL, EXPECTED
from repro.lab import flags, scenarios
from repro.lab.rank.environment import refuse_bad_variables
from repro.lab.search.confirmation import confirm
from repro.lab.search.minimise import BUDGET_S, RUN_DEADLINE_S, AnotherVerdict, Result, Runner, describe, minimise
from repro.lab.start import job
from repro.lab.start.machine import require_model
from repro.lab.start.series import Series
from repro.store.run_dir import refuse_unwritable, write_atomically, write_json
from repro.store.text import counted, escape_lines
from repro.verdict.classes import class_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("scenario", metavar="SCENARIO", help="the name of a scenario")
    parser.add_argument("--to", type=Path, metavar="FILE", help="the file to write; default: SCENARIO_minimal.py")
    flags.add_flags(parser, "num_ranks", "seed")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_S,
        metavar="S",
        help=f"seconds after which no further run starts; default: {BUDGET_S:g}",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Shrink the scenario, write the result as a Python file, and run this file. Returns the exit code:

    0    the written file hung, as it should
    1    the scenario's first run has a different verdict than the scenario predicts, so the scenario is not shrunk
    125  the first run is inconclusive or not possible here, the result cannot be written as one file, or the written
         file did not hang
    """
    refuse_bad_variables()
    start = flags.settings_of(args.scenario, "fault", flags.given(args), deadline_s=RUN_DEADLINE_S, checks="observe")
    path = args.to or Path(f"{args.scenario}_minimal.py")
    refuse_unwritable(path, "; choose another --to")
    require_model()
    where = sys.stderr if args.json else sys.stdout

    def say(text: str) -> None:
        print(escape_lines(text), file=where, flush=True)

    say(f"{args.scenario}: from {describe(start)}")
    with tempfile.TemporaryDirectory(prefix="repro-minimise-") as folder, job.launcher("fork") as start_ranks:
        runner = Runner(Series(Path(folder), start_ranks, args.interrupt), say)
        try:
            result = minimise(scenarios.load(args.scenario), start, runner, args.budget)
        except AnotherVerdict as error:
            print(f"repro: {args.scenario}: {escape_lines(str(error))}", file=sys.stderr)
            return class_of(error.verdict).exit_code
        runner.write_replay(result)
    if result.source:
        write_atomically(path, result.source)
        write_json(path.with_suffix(".json"), result.after.to_mapping())
        result.confirmed = confirm(path, result.after.num_ranks)
    _print_result(result, path, args.json)
    return EXPECTED if result.confirmed.startswith("HANG") else CANNOT_TELL


def _print_result(result: Result, path: Path, as_json: bool) -> None:
    lines = result.source.count("\n")
    if as_json:
        summary = {
            "verdict": result.verdict, "cause": result.cause, "settings": result.after.to_mapping(),
            "steps": result.steps, "runs": result.runs, "seconds": round(result.seconds, 1), "lines": lines,
            "file": str(path) if result.source else None, "confirmed": result.confirmed, "notes": result.notes,
        }  # fmt: skip
        print(json.dumps(summary, indent=1))
        return
    print(f"{result.verdict} {result.cause or ''} with {describe(result.after)}, {counted(result.steps, 'step')}")
    print(f"{counted(result.runs, 'run')} in {result.seconds:.0f} s")
    for note in result.notes:
        print(escape_lines(note))
    if result.source:
        print(f"{path}: {lines} lines; torchrun on this file printed: {escape_lines(result.confirmed)}")
