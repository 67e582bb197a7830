"""What can be done again with a run, as commands for a shell."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from repro.report.gather import Facts


def commands(facts: Facts) -> list[tuple[str, str]]:
    """(purpose, command) for all that run.json lists, and last the one that judges the run's files once more."""
    listed = facts.description.commands if facts.description else ()
    found = [(command.purpose, shlex.join(command.filled(place(facts)))) for command in listed]
    return [*found, ("judge these files once more", shlex.join(["python", "-m", "repro", "watch", place(facts)]))]


def place(facts: Facts) -> str:
    """The run directory as seen from where a command is given: the working folder, where that is above it."""
    if facts.place:
        return facts.place
    relative = os.path.relpath(facts.root)
    return str(facts.root.resolve()) if relative.startswith("..") else Path(relative).as_posix()
