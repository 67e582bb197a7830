"""The report of a run: report.html, timeline.svg and trace.json, from the files that the run left.

It never imports torch, and it trusts no file: the page lists what is missing or damaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from repro.report.gather import Facts, gather, siblings
from repro.report.page.page import render
from repro.report.pictures.timeline import timeline
from repro.report.trace import trace
from repro.store.run_dir import write_atomically

FILES = ("report.html", "timeline.svg", "trace.json")


def write(root: Path, beside: Sequence[Path] | None = None, place: str = "") -> Facts:
    """Write the three files into a run directory; returns what they were made from.

    beside: runs to set beside this one; by default the newest ones of its folder that differ in their variant only.
    place: what commands call the directory, where that is not its place here.

    Raises ConfigError when the folder holds nothing of a run, OSError when it cannot be written to.
    """
    facts = gather(root)
    facts.place = place
    others = [gather(path) for path in (siblings(root, facts) if beside is None else beside)]
    picture = timeline(facts)
    write_atomically(root / "timeline.svg", picture)
    write_atomically(root / "trace.json", trace(facts))
    write_atomically(root / "report.html", render(facts, others, picture))
    return facts


def write_all(roots: Iterable[Path]) -> list[Facts]:
    """:func:`write` for each run."""
    return [write(root) for root in roots]
