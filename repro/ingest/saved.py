"""Save and load the evidence of a diagnosis as one file, records.jsonl.

`hmr diagnose --out` and `hmr bundle` write this file. If a folder or zip has records.jsonl, only this file is read: the
other files there were made from its records.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from hybrid_moe_ref.files import open_regular, write_atomically
from repro.ingest.read import Evidence
from repro.trace.foreign import json_lines

NAME = "records.jsonl"
MAX_BYTES = 1 << 30


def is_saved(path: Path) -> bool:
    """Whether a path is a folder or zip that has, at its top level, the file records.jsonl of an earlier diagnosis."""
    if path.is_dir():
        return (path / NAME).is_file()
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.filename == NAME for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def load(folder: Path) -> Evidence:
    """Read records.jsonl in a folder. Raises OSError, or DamagedFile ("file:line: problem") if the file is damaged."""
    with open_regular(folder / NAME, MAX_BYTES) as file:
        return Evidence(*json_lines.decode(file, NAME))


def save(folder: Path, evidence: Evidence) -> None:
    """Write records.jsonl into a folder. Raises OSError if the file cannot be written."""
    lines = json_lines.encode(evidence.records, evidence.files, evidence.not_understood)
    write_atomically(folder / NAME, b"".join(lines))
