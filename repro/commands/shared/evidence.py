"""Load the evidence under paths: files of any tool, folders, and bundles of earlier diagnoses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repro.ingest import saved
from repro.ingest.read import Evidence, read


def evidence_of(paths: Sequence[Path]) -> Evidence:
    """Return the evidence under the paths. `Evidence.not_understood` lists the files that no reader understands.

    Raises DamagedFile for a damaged folder from `diagnose --out`, and ArchiveError for a damaged bundle of such a
    folder.
    """
    earlier = [path for path in paths if saved.is_saved(path)]
    evidence = read([path for path in paths if path not in earlier])
    for path in earlier:
        evidence = evidence.joined(saved.load(path) if path.is_dir() else _of_a_bundle(path))
    return evidence


def _of_a_bundle(path: Path) -> Evidence:
    from repro import bundle  # imported here, because it imports the judge of runs, which most evidence does not need

    with bundle.opened(path) as folder:
        return saved.load(folder)
