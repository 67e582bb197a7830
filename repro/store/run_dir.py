"""The directory of one run: who writes which file, and how a file appears whole or not at all.

run.json               what the run is, commands to repeat it  whoever makes the directory
config.json            the settings of a run of the lab      launcher, before the ranks
events/rank000.wit     the witness a rank leaves             the rank, as it goes
stacks/rank000.txt     Python stacks                         the rank's faulthandler, when asked
fr/rank000.json        PyTorch's Flight Recorder             the rank, when asked
logs/rank000.log       what the rank printed                 the rank
logs/launcher.log      what started the ranks printed        torchrun, or repro.lab.fork_server
logs/reference.log     what the reference printed            repro.lab.reference
logs/watcher.log       traceback of a failed watcher         watcher
env/rank000.txt        versions it loaded                    the rank, once connected
outputs/rank000.json   tokens served                         the rank, when done
reference.json         tokens of the single-process model    repro.lab.reference
verdict.json           the verdict                           watcher, before anything is killed
release                tells parked ranks to exit            watcher
interrupted            the user wants an end                 a rank that got SIGINT; gone when the run is decided
evidence_request, agents/  between watcher and other hosts       see repro.hosts.agent; gone when the run is decided
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_moe_ref.files import MAX_JSON_BYTES as MAX_JSON_BYTES
from hybrid_moe_ref.files import DamagedFile, open_regular
from hybrid_moe_ref.files import read_json as read_json
from hybrid_moe_ref.files import write_atomically as write_atomically

RUN_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[a-z0-9_]+-(control|fault|fix)-(-?\d+)")
"""What a run directory is called: utc, scenario, variant, seed."""

MAX_TOKENS_BYTES = 4 << 20
MAX_TEXT_BYTES = 1 << 20

PARTS = ("events", "stacks", "fr", "logs", "env", "outputs")


class OutputError(OSError):
    """The output directory cannot be used; the text says where, why and what to do."""


SUFFIX = ".wit"
"""Of the file that a rank writes."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @classmethod
    def create(cls, out: Path, scenario: str, variant: str, seed: int) -> RunDir:
        """Make ``<out>/<utc>-<scenario>-<variant>-<seed>``, never one that exists.

        Raises OutputError when that cannot be done.
        """
        try:
            out.mkdir(parents=True, exist_ok=True)
            root = _make_unique(out.resolve(), f"{scenario}-{variant}-{seed}")
            for part in PARTS:
                (root / part).mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
        return cls(root)

    def point_latest(self) -> None:
        """Let ``latest`` beside it name this run; OSError when that cannot be done, and then nothing has changed."""
        link = self.root.with_name(f".latest.{os.getpid()}")
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(self.root.name)
            os.replace(link, self.root.with_name("latest"))
        except OSError as error:
            link.unlink(missing_ok=True)
            if error.errno != errno.EPERM:  # a file system without links: a convenience lost, not a run
                raise

    def _rank_file(self, part: str, rank: int, suffix: str) -> Path:
        return self.root / part / f"rank{rank:03d}.{suffix}"

    def witness(self, rank: int) -> Path:
        return self._rank_file("events", rank, SUFFIX.removeprefix("."))

    def stack(self, rank: int) -> Path:
        return self._rank_file("stacks", rank, "txt")

    def flight_recorder(self, rank: int) -> Path:
        return self._rank_file("fr", rank, "json")

    def log(self, rank: int) -> Path:
        return self._rank_file("logs", rank, "log")

    def output(self, rank: int) -> Path:
        return self._rank_file("outputs", rank, "json")

    def environment(self, rank: int) -> Path:
        return self._rank_file("env", rank, "txt")

    @property
    def launcher_log(self) -> Path:
        return self.root / "logs" / "launcher.log"

    @property
    def reference_log(self) -> Path:
        return self.root / "logs" / "reference.log"

    @property
    def watcher_log(self) -> Path:
        return self.root / "logs" / "watcher.log"

    @property
    def description(self) -> Path:
        return self.root / "run.json"

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def reference(self) -> Path:
        return self.root / "reference.json"

    @property
    def verdict(self) -> Path:
        return self.root / "verdict.json"

    @property
    def cache(self) -> Path:
        """What ranks tuned or compiled; made when something is kept, and removed with the run's temporary files."""
        return self.root / "tmp" / "cache"

    @property
    def release(self) -> Path:
        return self.root / "release"

    @property
    def interrupted(self) -> Path:
        return self.root / "interrupted"

    @property
    def evidence_request(self) -> Path:
        return self.root / "evidence_request"

    @property
    def agents(self) -> Path:
        return self.root / "agents"

    def agent(self, first_rank: int) -> Path:
        return self._rank_file("agents", first_rank, "json")

    def contents(self) -> list[Path]:
        """All files of the run and the folders that they are in."""
        folders = [self.root, *(self.root / part for part in PARTS)]
        return [path for folder in folders for path in (folder, *folder.glob("*")) if path == folder or path.is_file()]

    def describe(self, error: Exception) -> str:
        """An error's text with files named from the run directory on, which is elsewhere on another machine."""
        return str(error).replace(f"{self.root}/", "")

    @property
    def store(self) -> Path:
        """File that the ranks of one host meet through; no port is opened for it."""
        return self.root / "store"


def refuse_unwritable(path: Path, hint: str = "") -> None:
    """Raise OutputError where a file of this name could not be written; asked before the work that it is to hold."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not path.is_file():
            raise OSError(None, "not a regular file")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}{hint}") from error


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """:func:`write_atomically` of readable JSON."""
    write_atomically(path, json.dumps(value, indent=1) + "\n", durable=durable)


def read_tokens(path: Path) -> dict[str, list[int]]:
    """Read the tokens of each request from reference.json or an output; raises DamagedFile as :func:`read_json`."""
    document = read_json(path, MAX_TOKENS_BYTES)
    rows = document.values() if isinstance(document, dict) else [None]
    if not all(isinstance(row, list) and all(isinstance(token, int) for token in row) for row in rows):
        raise DamagedFile(f"{path}:1: not lists of tokens by request")
    return dict(document)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The end of a text file; "" where there is none."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit))
            return file.read(limit).decode(errors="replace")
    except (OSError, ValueError):
        return ""


def _make_unique(out: Path, name: str) -> Path:
    while True:
        now = time.time()
        utc = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        try:
            (out / f"{utc}-{name}").mkdir()
            return out / f"{utc}-{name}"
        except FileExistsError:
            time.sleep(0.001)
