"""`python -m repro diagnose PATH…`: read the evidence of a job that is not ours, and say what it proves."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repro.commands import own_runs
from repro.ingest.read import Evidence, read
from repro.report.diagnosis.issue import issue
from repro.report.diagnosis.page import page
from repro.store.run_dir import write_json
from repro.store.text import counted, escape_lines
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html, ISSUE.md and diagnosis.json there")
    parser.set_defaults(command=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """0 for a verdict, 125 for `inconclusive`, 2 where no file was usable."""
    for path in args.paths:
        if not path.exists():
            args.parser.error(f"{path}: no such file or folder")
    if len(args.paths) == 1 and own_runs.is_own(args.paths[0]):
        diagnosis, evidence = own_runs.judge(args.paths[0])
        return _said(args, diagnosis, evidence)
    evidence = read(args.paths)
    if not evidence.records:
        for line in evidence.not_understood or ["the paths hold no files"]:
            print(escape_lines(f"not understood: {line}"))
        return NOTHING_USABLE
    return _said(args, diagnose(evidence.records), evidence)


def _said(args: argparse.Namespace, diagnosis: Diagnosis, evidence: Evidence) -> int:
    if args.out:
        _write(args.out, args.paths, diagnosis, evidence)
    if args.json:
        print(json.dumps(document(diagnosis, evidence), indent=1))
    else:
        print(escape_lines("\n".join(lines(diagnosis, evidence))))
    return CANNOT_TELL if diagnosis.verdict == "inconclusive" else FOUND


def _write(out: Path, paths: Sequence[Path], diagnosis: Diagnosis, evidence: Evidence) -> None:
    out.mkdir(parents=True, exist_ok=True)
    scene = Scene.of(evidence.records)
    (out / "report.html").write_text(page(diagnosis, evidence, scene), encoding="utf-8")
    apart = {str(path): diagnose(read([path]).records) for path in paths} if len(paths) > 1 else {}
    text = issue(headline(diagnosis), diagnosis, evidence, scene, {name: headline(one) for name, one in apart.items()})
    (out / "ISSUE.md").write_text(escape_lines(text) + "\n", encoding="utf-8")
    write_json(out / "diagnosis.json", document(diagnosis, evidence))


def document(diagnosis: Diagnosis, evidence: Evidence) -> dict[str, Any]:
    return {
        "schema_version": 1, **diagnosis.to_json(), "files": evidence.files, "not_understood": evidence.not_understood,
    }  # fmt: skip


def lines(diagnosis: Diagnosis, evidence: Evidence) -> list[str]:
    """The diagnosis for a terminal: at most MAX_LINES lines. The first names class, cause and who."""
    tail = [row for text in diagnosis.refutes[:1] for row in _wrapped("refuted by: ", text)]
    tail += [row for text in diagnosis.collect[:2] for row in _wrapped("collect next: ", text)]
    tail += [row for text in diagnosis.notes[:3] for row in _wrapped("note: ", text)[:2]]
    if evidence.not_understood:
        tail.append(
            f"not understood: {counted(len(evidence.not_understood), 'file')}, the first {evidence.not_understood[0]}"[
                :WIDTH
            ]
        )
    tail = tail[: MAX_LINES // 2]
    out = [headline(diagnosis)]
    out += _fitting("", diagnosis.summary, MAX_LINES // 3)
    return out + _fitting("why: ", diagnosis.evidence, MAX_LINES - len(out) - len(tail)) + tail


def headline(diagnosis: Diagnosis) -> str:
    """ "deadlock (skipped), likely, culprits: 2"."""
    cause = f" ({diagnosis.cause})" if diagnosis.cause else ""
    culprits = f", culprits: {list_ranks(diagnosis.culprits)}" if diagnosis.culprits else ""
    suspects = f", suspects: {list_ranks(diagnosis.suspects)}" if diagnosis.suspects else ""
    return f"{diagnosis.verdict}{cause}, {diagnosis.confidence}{culprits or ', nobody is named'}{suspects}"


def _fitting(label: str, texts: Sequence[str], room: int) -> list[str]:
    """The texts that fit into so many lines, each whole; of a first one that does not fit, its beginning."""
    out: list[str] = []
    for number, text in enumerate(texts):
        rows = _wrapped(label, text)
        last = number == len(texts) - 1
        if len(rows) > room - (not last):
            rest = f"{len(texts) - number} more" if number else "the rest"
            return [*out, *(() if number else rows[: room - 1]), f"{label}… {rest}: --json"]
        out += rows
        room -= len(rows)
    return out


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(label + text, WIDTH, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
