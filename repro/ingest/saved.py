"""Save and load the evidence of a diagnosis as one file, records.jsonl, in the folder of `diagnose --out` or a bundle.

If a folder or zip has such a file, only this file is read: the other files were made from the same records.
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
    """Whether a path is a folder or zip with the saved evidence of a diagnosis at its top level."""
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
    """Load the evidence in a folder. Raises OSError, and DamagedFile ("file:line: what") for a damaged file."""
    with open_regular(folder / NAME, MAX_BYTES) as file:
        return Evidence(*json_lines.decode(file, NAME))


def save(folder: Path, evidence: Evidence) -> None:
    """Write the evidence. Raises OSError."""
    lines = json_lines.encode(evidence.records, evidence.files, evidence.not_understood)
    write_atomically(folder / NAME, b"".join(lines))
