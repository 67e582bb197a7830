"""`python -m repro diagnose PATH…`: read the evidence of a job that is not ours, and say what it proves."""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

from repro.ingest.read import Evidence, read
from repro.report.diagnosis import page
from repro.store.run_dir import write_json
from repro.store.text import escape_lines
from repro.verdict.partial import Diagnosis, diagnose
from repro.verdict.partial.scene import Scene
from repro.verdict.result import list_ranks

FOUND, NOTHING_USABLE, CANNOT_TELL = 0, 2, 125
MAX_LINES = 25
WIDTH = 118


def add(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser("diagnose", help="what dumps, stacks and logs of any torch.distributed job prove")
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="files, folders and zips, in any mixture")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html and diagnosis.json there")
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """0 for a verdict, 125 for `inconclusive`, 2 where no file was usable."""
    for path in args.paths:
        if not path.exists():
            args.parser.error(f"{path}: no such file or folder")
    evidence = read(args.paths)
    if not evidence.records:
        for line in evidence.not_understood or ["the paths hold no files"]:
            print(escape_lines(f"not understood: {line}"))
        return NOTHING_USABLE
    diagnosis = diagnose(evidence.records)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.html").write_text(page(diagnosis, evidence, Scene.of(evidence.records)), encoding="utf-8")
        write_json(args.out / "diagnosis.json", document(diagnosis, evidence))
    if args.json:
        print(json.dumps(document(diagnosis, evidence), indent=1))
    else:
        print(escape_lines("\n".join(lines(diagnosis, evidence))))
    return CANNOT_TELL if diagnosis.verdict == "inconclusive" else FOUND


def document(diagnosis: Diagnosis, evidence: Evidence) -> dict[str, Any]:
    return {
        "schema_version": 1, **diagnosis.to_json(), "files": evidence.files, "not_understood": evidence.not_understood,
    }  # fmt: skip


def lines(diagnosis: Diagnosis, evidence: Evidence) -> list[str]:
    """The diagnosis for a terminal: at most MAX_LINES lines; what does not fit is counted."""
    cause = f" ({diagnosis.cause})" if diagnosis.cause else ""
    culprits = f", culprits: {list_ranks(diagnosis.culprits)}" if diagnosis.culprits else ""
    suspects = f", suspects: {list_ranks(diagnosis.suspects)}" if diagnosis.suspects else ""
    out = [f"{diagnosis.verdict}{cause}, {diagnosis.confidence}{culprits or ', nobody is named'}{suspects}"]
    out += [row for text in diagnosis.summary for row in _wrapped("", text)]
    tail = [row for text in diagnosis.refutes[:1] for row in _wrapped("refuted by: ", text)]
    tail += [row for text in diagnosis.collect[:2] for row in _wrapped("collect next: ", text)]
    tail += [row for text in diagnosis.notes for row in _wrapped("note: ", text)]
    if evidence.not_understood:
        tail.append(
            f"not understood: {len(evidence.not_understood)} files, the first {evidence.not_understood[0]}"[:WIDTH]
        )
    why = [_wrapped("why: ", text) for text in diagnosis.evidence]
    room = MAX_LINES - len(out) - len(tail) - 1
    for number, rows in enumerate(why):
        if len(rows) > room:
            out.append(f"why: … and {len(why) - number} more (--json)")
            break
        out += rows
        room -= len(rows)
    return out + tail


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(label + text, WIDTH, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
