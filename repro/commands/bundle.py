"""``bundle RUN``: make a bundle of a run, or compare a bundle with its manifest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hybrid_moe_ref.config import ConfigError
from repro.bundle.archive import MANIFEST, verify
from repro.bundle.assemble import make
from repro.bundle.redact import search
from repro.bundle.redact.recognise import LEFT_OUT
from repro.lab.outcome.second_judgement import compare_again
from repro.store.run_dir import refuse_unwritable
from repro.store.text import escape_control_characters, escape_lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or with --verify a zip")
    parser.add_argument("--verify", action="store_true", help="compare a zip with its manifest")
    parser.add_argument("--to", type=Path, metavar="ZIP", help="default: beside the run")
    parser.add_argument(
        "--with-logs",
        action="store_true",
        help="add unrecognised text in which nothing suspicious is found",
    )
    parser.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Make a bundle and print what was left out; or verify one. Return 0, or 1 if it differs from its manifest."""
    if args.verify:
        wrong = verify(args.run)
        if args.json:
            print(json.dumps({"bundle": str(args.run), "wrong": wrong}, indent=1))
        else:
            print(escape_lines("\n".join(wrong)) or f"{args.run}: every file is as {MANIFEST} says")
        return int(bool(wrong))
    if args.with_logs:
        try:
            search.load()
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}; pip install detect-secrets", "--with-logs") from None
    if args.run.is_dir():
        root = args.run.resolve()
        refuse_unwritable(args.to or root.parent / f"{root.name}.zip", "; choose another --to")
    made = make(args.run, args.to, args.with_logs, compare_again)
    if args.json:
        document = {"bundle": str(made.path), "bytes": made.size, "left_out": dict(made.left_out), "notes": made.notes}
        print(json.dumps(document, indent=1))
        return 0
    print(f"{made.path}: {made.size / 1e6:.2f} MB")
    for kind, what in LEFT_OUT.items():
        if count := made.left_out.get(kind, 0):
            print(f"  left out or replaced {count}: {what}")
    if args.with_logs:
        print("  unrecognised text in which nothing suspicious was found is included: read it before you post")
    elif made.left_out:
        print("  --with-logs adds unrecognised text in which nothing suspicious is found")
    for note in made.notes:
        print(escape_control_characters(f"  {note}", 4000))
    return 0
