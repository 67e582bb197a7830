"""``report RUN...``: write the report of existing runs, and print its path."""

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
    parser.add_argument("--json", action="store_true", help="print what was written and what is missing as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the reports and return 0."""
    documents = []
    for root in filter(Path.is_dir, args.runs):
        refuse_unwritable(root / report.FILES[0])
    for root in args.runs:
        facts = report.write(root.resolve())
        files = [str(facts.root / name) for name in report.FILES]
        documents.append({"run": str(facts.root), "files": files, "missing": facts.missing})
        if not args.json:
            print(escape_control_characters(f"{files[0]}: {headline(facts.verdict)}", 4000))
            for text in facts.missing:
                print(escape_control_characters(f"  {text}", 4000))
    if args.json:
        print(json.dumps(documents, indent=1))
    return 0
