"""`python -m repro diagnose PATH…`: read the evidence that any job left, and print what the evidence proves."""

from __future__ import annotations

import argparse
import json
import textwrap
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repro.exit_codes import CANNOT_TELL, EXPECTED, USAGE
from repro.store.text import counted, escape_lines

if TYPE_CHECKING:
    from repro.ingest.read import Evidence
    from repro.verdict.partial import Diagnosis

MAX_LINES = 25
WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="files, folders and zips, in any combination"
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the verdict, a page and the text of an issue into this folder"
    )


def run(args: argparse.Namespace) -> int:
    """Print the verdict on the evidence under the paths. With --out, also write the verdict and a page into a folder.

    Returns 125 for the verdict `inconclusive`, 0 for any other verdict, and 2 if no file was usable.
    """
    from repro.commands.shared.evidence import evidence_of
    from repro.verdict.partial import diagnose

    for path in args.paths:
        if not path.exists():
            args.parser.error(f"{path}: no such file or folder")
    if len(args.paths) == 1 and is_own_run(args.paths[0]):
        from repro.commands.shared import own_runs  # needs the lab's settings, which other evidence does not need

        if args.out:
            args.parser.error(
                "--out is not for runs of this program: use `report RUN`, which writes the page into "
                "the run's directory"
            )
        return say(*own_runs.judge(args.paths[0]), args.json)
    evidence = evidence_of(args.paths)
    if not evidence.records:
        for line in evidence.not_understood or ["the paths hold no files"]:
            print(escape_lines(f"not understood: {line}"))
        return USAGE
    diagnosis = diagnose(evidence.records)
    if args.out:
        from repro.report.diagnosis import folder

        alone = {str(path): diagnose(evidence_of([path]).records) for path in args.paths} if args.paths[1:] else {}
        folder.write(args.out, diagnosis, evidence, alone)
    return say(diagnosis, evidence, args.json)


def is_own_run(path: Path) -> bool:
    """Whether a path is a run directory of the lab, or a bundle of one."""
    if path.is_dir():
        return (path / "config.json").is_file() and (path / "events").is_dir()
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False
    parts = [name.split("/") for name in names]
    return any(part[-1] == "config.json" for part in parts) and any("events" in part[:-1] for part in parts)


def say(diagnosis: Diagnosis, evidence: Evidence, as_json: bool) -> int:
    """Print a diagnosis. Returns the exit code: 125 if its verdict is `inconclusive`, else 0."""
    from repro.verdict.classes import class_of

    if as_json:
        from repro.report.diagnosis.folder import document

        print(json.dumps(document(diagnosis, evidence), indent=1))
    else:
        print(escape_lines("\n".join(lines(diagnosis, evidence))))
    return EXPECTED if class_of(diagnosis.verdict).decided else CANNOT_TELL


def lines(diagnosis: Diagnosis, evidence: Evidence) -> list[str]:
    """Format a diagnosis for a terminal, in at most MAX_LINES lines. The first line has class, cause and culprits."""
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
    out = [diagnosis.headline()]
    out += _fitting("", diagnosis.summary, MAX_LINES // 3)
    return out + _fitting("why: ", diagnosis.evidence, MAX_LINES - len(out) - len(tail)) + tail


def _fitting(label: str, texts: Sequence[str], room: int) -> list[str]:
    """Return the texts as at most ``room`` lines, with ``label`` at the beginning of each text.

    If not all texts fit, the last line says so. A text that does not fit completely is left out, and so are all texts
    after it. Only the first text is shortened instead.
    """
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
