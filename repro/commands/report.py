"""``report RUN...``: write the reports of existing runs again, and print the path of each report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from repro import report
from repro.report.gather import headline
from repro.store.run_dir import refuse_unwritable
from repro.store.text import escape_control_characters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory")
    parser.add_argument("--json", action="store_true", help="print what was written and what is missing, as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the report of each run, print its path and what evidence is missing, and return 0."""
    from repro.ingest import saved

    documents = []
    for root in filter(Path.is_dir, args.runs):
        refuse_unwritable(root / report.FILES[0])
    for root in args.runs:
        files, line, missing = _of_a_diagnosis(root) if root.is_dir() and saved.is_saved(root) else _of_a_run(root)
        documents.append({"run": str(root.resolve()), "files": files, "missing": missing})
        if not args.json:
            print(escape_control_characters(f"{files[0]}: {line}", 4000))
            for text in missing:
                print(escape_control_characters(f"  {text}", 4000))
    if args.json:
        print(json.dumps(documents, indent=1))
    return 0


def _of_a_run(root: Path) -> tuple[list[str], str, list[str]]:
    """Write the report of a run. Returns (written files, the verdict as a sentence, the missing evidence)."""
    data = report.write(root.resolve())
    return [str(data.root / name) for name in report.FILES], headline(data.verdict), data.missing


def _of_a_diagnosis(root: Path) -> tuple[list[str], str, list[str]]:
    """Write the report of a folder from `diagnose --out`.

    Returns (written files, the diagnosis as a sentence, the files that were not understood).
    """
    from repro.ingest import saved
    from repro.report.diagnosis.folder import write_page
    from repro.verdict.partial import diagnose

    evidence = saved.load(root)
    diagnosis = diagnose(evidence.records)
    return [str(write_page(root.resolve(), diagnosis, evidence))], diagnosis.headline(), evidence.not_understood
