"""The commands that repeat a run or judge its files again."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from repro.report.gather import Facts


def commands(facts: Facts) -> list[tuple[str, str]]:
    """Return (purpose, shell command) of the commands in run.json, and of the one that judges the files again."""
    listed = facts.description.commands if facts.description else ()
    repeats = [(command.purpose, shlex.join(command.filled(place(facts)))) for command in listed]
    return [*repeats, ("judge these files again", shlex.join(["python", "-m", "repro", "watch", place(facts)]))]


def place(facts: Facts) -> str:
    """Return the path of the run directory, relative to the working folder if it is inside it."""
    if facts.place:
        return facts.place
    relative = os.path.relpath(facts.root)
    return str(facts.root.resolve()) if relative.startswith("..") else Path(relative).as_posix()
