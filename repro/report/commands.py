"""The commands that repeat a run or judge its files again."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from repro.report.gather import RunData


def commands(data: RunData) -> list[tuple[str, str]]:
    """Return (purpose, shell command) for each command in run.json, then for the command that judges the run again."""
    listed = data.description.commands if data.description else ()
    repeats = [(command.purpose, shlex.join(command.filled(place(data)))) for command in listed]
    return [*repeats, ("judge these files again", shlex.join(["python", "-m", "repro", "watch", place(data)]))]


def place(data: RunData) -> str:
    """Return the path of the run directory as commands show it: ``data.place``, if it is set.

    Otherwise the path is relative if the run is below the working folder, else absolute.
    """
    if data.place:
        return data.place
    relative = os.path.relpath(data.root)
    return str(data.root.resolve()) if relative.startswith("..") else Path(relative).as_posix()
