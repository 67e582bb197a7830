"""``bundle RUN``: bundle a run or another job's evidence; with --verify, compare a bundle with its manifest."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hybrid_moe_ref.config import ConfigError
from repro.bundle.archive import MANIFEST, verify
from repro.bundle.assemble import Made, judge_copy, make
from repro.bundle.evidence import make_of_evidence
from repro.bundle.redact import search
from repro.bundle.redact.recognise import LEFT_OUT
from repro.commands.diagnose import is_own_run
from repro.commands.shared.evidence import evidence_of
from repro.ingest import saved
from repro.store.run_dir import RunDir, refuse_unwritable
from repro.store.text import escape_control_characters, escape_lines
from repro.verdict import Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = (
        "a run directory; evidence (a folder or zip) that `diagnose` reads; a folder that `diagnose --out` wrote; "
        "with --verify a bundle"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help=what)
    other = "evidence of another run with one setting changed; ISSUE.md then has a table of all verdicts"
    parser.add_argument("others", type=Path, metavar="OTHER", nargs="*", default=(), help=other)
    parser.add_argument("--verify", action="store_true", help="compare a zip with its own manifest")
    parser.add_argument("--to", type=Path, metavar="ZIP", help="the zip to write; default: beside the run")
    parser.add_argument(
        "--with-logs",
        action="store_true",
        help="also include text that no rule recognises and that does not look like a secret",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Make a bundle and print what it does not contain. With --verify, compare a bundle with its own manifest instead.

    Returns 0; 1 if --verify finds a difference.
    """
    if args.verify:
        wrong = verify(args.run)
        if args.json:
            print(json.dumps({"bundle": str(args.run), "wrong": wrong}, indent=1))
        else:
            print(escape_lines("\n".join(wrong)) or f"{args.run}: every file matches {MANIFEST}")
        return int(bool(wrong))
    if args.with_logs:
        try:
            search.load()
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}; pip install detect-secrets", "--with-logs") from None
    made = _made(args)
    if args.json:
        document = {"bundle": str(made.path), "bytes": made.size, "left_out": dict(made.left_out), "notes": made.notes}
        print(json.dumps(document, indent=1))
        return 0
    print(f"{made.path}: {made.size / 1e6:.2f} MB")
    for kind, what in LEFT_OUT.items():
        if count := made.left_out.get(kind, 0):
            print(f"  left out or replaced {count}: {what}")
    if args.with_logs:
        print(
            "  text that no rule recognises is included, where nothing looks like a secret: read it before you "
            "publish the bundle"
        )
    elif made.left_out:
        print("  --with-logs adds text that no rule recognises, where nothing looks like a secret")
    for note in made.notes:
        print(escape_control_characters(f"  {note}", 4000))
    return 0


def _made(args: argparse.Namespace) -> Made:
    """Bundle a run of this program or evidence for `diagnose`; the files under the path decide which of the two."""
    root = args.run.resolve()
    target = args.to or root.parent / f"{root.stem if root.is_file() else root.name}{'.bundle' * root.is_file()}.zip"
    if root.exists():
        refuse_unwritable(target, "; choose another --to")
    if _is_of_this_program(root):
        if args.others:
            raise ConfigError("the bundle of a run includes its other variants: give one run only", str(args.others[0]))
        return make(args.run, args.to, args.with_logs, _judge)
    evidence = evidence_of([root])
    if not evidence.records:
        raise ConfigError(
            f"this is neither a run directory nor evidence: {(evidence.not_understood or ['it has no files'])[0]}",
            str(args.run),
        )
    return make_of_evidence(evidence, target, args.with_logs, {path.name: evidence_of([path]) for path in args.others})


def _judge(run_dir: RunDir) -> Verdict:
    """Judge the copy of a run that goes into the bundle, in the same way as `watch`."""
    from repro.attach import recording  # imported here, because a bundle of other evidence does not need it

    if recording.is_recording(run_dir):
        return recording.verdict_of(run_dir)
    from repro.lab.outcome.second_judgement import compare_again

    return judge_copy(run_dir, compare_again(run_dir))


def _is_of_this_program(root: Path) -> bool:
    """Whether to bundle a path as a run of this program. If not, it is bundled as evidence for `diagnose`."""
    if root == Path(root.anchor) or not root.exists():
        return True  # the path is not a run directory either, and the error of reading it as one says so
    is_run = (root / "events").is_dir() or any((root / name).is_file() for name in ("run.json", "verdict.json"))
    return not saved.is_saved(root) and (is_run or is_own_run(root))
