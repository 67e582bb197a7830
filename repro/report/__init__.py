"""The report of a run: report.html, timeline.svg and trace.json, made from the files that the run left.

The report never imports torch. It trusts no file of the run: the page lists which files are missing or damaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from repro.report.gather import RunData, gather, siblings
from repro.report.page.page import render
from repro.report.pictures.timeline import timeline
from repro.report.trace import trace
from repro.store.run_dir import write_atomically

FILES = ("report.html", "timeline.svg", "trace.json")


def write(root: Path, beside: Sequence[Path] | None = None, place: str = "") -> RunData:
    """Write the three files of the report into a run directory. Returns the data from which they were made.

    beside: other runs to show on the page. By default these are runs in the same folder: the newest run of each other
    variant, with the same settings otherwise.
    place: the path to show in the commands of the report instead of ``root``, for example after the run has moved.

    Raises ConfigError if the folder ``root`` contains nothing of a run, OSError if a file cannot be written there.
    """
    data = gather(root)
    others = [gather(path) for path in (siblings(root, data) if beside is None else beside)]
    _write(data, others, place)
    return data


def write_all(roots: Iterable[Path]) -> None:
    """Write the report of each run directory as :func:`write` does, but read each run only once."""
    read = {root.resolve(): gather(root) for root in roots}
    for root, data in read.items():
        _write(data, [read.get(path) or gather(path) for path in siblings(root, data)])


def _write(data: RunData, others: Sequence[RunData], place: str = "") -> None:
    data.place = place
    picture = timeline(data)
    write_atomically(data.root / "timeline.svg", picture)
    write_atomically(data.root / "trace.json", trace(data))
    write_atomically(data.root / "report.html", render(data, others, picture))
