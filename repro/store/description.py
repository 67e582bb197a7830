"""run.json: the description of a run, written by the program that creates the run directory.

The programs that later report, bundle or judge the run read the description from this file. They need nothing else
from the program that started the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybrid_moe_ref.config import Config, ConfigError
from hybrid_moe_ref.files import DamagedFile, read_json

SCHEMA_VERSION = 1
MAX_BYTES = 1 << 18
MAX_COMMANDS = 16
MAX_RANKS = 1 << 20
MAX_SECONDS = 1e6

VARIANTS = ("control", "fault", "fix")
"""The three ways to run a scenario: without the fault; with the fault; with the fix, under the condition that triggers
the fault."""

RUN_FOLDER = "{run}"
"""Placeholder for the path of the run's folder in a command: ``{run}`` or ``{run}/verdict.json``."""


@dataclass(frozen=True)
class Command(Config):
    """A shell command that run.json offers to the reader, for example to repeat the run.

    purpose   what the command does: "run it again"
    words     the program and its arguments, unquoted; RUN_FOLDER stands for the path of the run's folder
    """

    purpose: str
    words: tuple[str, ...]

    def filled(self, folder: str) -> tuple[str, ...]:
        """Return the program and its arguments, with the path ``folder`` in place of RUN_FOLDER."""
        return tuple(
            folder + word.removeprefix(RUN_FOLDER) if word == RUN_FOLDER or word.startswith(f"{RUN_FOLDER}/") else word
            for word in self.words
        )


@dataclass(frozen=True)
class RunDescription(Config):
    """The content of run.json.

    title           name of the run; in the lab, the name of its scenario
    num_ranks       number of ranks of the job
    quiet_window_s  seconds without an event on any rank after which the watcher calls the judge
    deadline_s      seconds after which the watcher stops, even without a verdict
    queued_groups   groups (such as NCCL's) whose collectives a rank records when it queues them, not when they run
    mechanism       how the fault causes the hang, in one line
    source          the upstream bug report or change that the run reproduces
    family          a key by which a report finds the other variants of this run: runs have the same key if all their
                    settings except ``variant`` and ``checks`` are equal; "" outside the lab
    variant         one of VARIANTS; "" outside the lab
    commands        commands that repeat this run, or run another variant of it
    """

    title: str
    num_ranks: int
    quiet_window_s: float
    deadline_s: float
    queued_groups: tuple[str, ...] = ()
    mechanism: str = ""
    source: str = ""
    family: str = ""
    variant: str = ""
    commands: tuple[Command, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ConfigError(f"{self.schema_version} is not a version that this release reads", "schema_version")
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise ConfigError(f"{self.num_ranks} is not a number of ranks in 1..{MAX_RANKS}", "num_ranks")
        for name in ("quiet_window_s", "deadline_s"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:
                raise ConfigError(f"{getattr(self, name)} is not a number of seconds up to {MAX_SECONDS:,.0f}", name)
        if self.variant not in ("", *VARIANTS):
            raise ConfigError(f"unknown variant {self.variant!r}; known: {', '.join(VARIANTS)}"[:200], "variant")
        if len(self.commands) > MAX_COMMANDS:
            raise ConfigError(f"there are {len(self.commands)}, but at most {MAX_COMMANDS} are allowed", "commands")


def read_description(path: Path) -> RunDescription:
    """Read run.json.

    Raises OSError if the file cannot be read, and DamagedFile with file, field and problem if it is malformed.
    """
    try:
        return RunDescription.from_mapping(read_json(path, MAX_BYTES))
    except ConfigError as error:
        raise DamagedFile(f"{path}:1: {error}") from None
