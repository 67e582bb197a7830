"""The directory of one run: the path of each file, and functions that read and write such files.

file                   content                                 written by
run.json               what the run is, commands to repeat it  the program that creates the directory
config.json            the settings of a run of the lab        the launcher, before the ranks start
events/rank000.wit     the witness of a rank                   the rank, while it runs
stacks/rank000.txt     Python stacks                           the rank's faulthandler, on request
fr/rank000.json        PyTorch's Flight Recorder dump          the rank, on request
logs/rank000.log       what the rank printed                   the rank
logs/launcher.log      what the launcher printed               torchrun, or repro.lab.start.fork_server
logs/reference.log     what the reference model printed        repro.lab.outcome.reference
logs/watcher.log       traceback of a failed watcher           the watcher
facts/HOST.look1.json  facts about the processes of a host     `hmr collect`
env/rank000.txt        versions of the loaded libraries        the rank, after its imports
outputs/rank000.json   tokens that the rank served             the rank, when it is done
reference.json         tokens of the single-process model      repro.lab.outcome.reference
verdict.json           the verdict                             the watcher, before it ends any process
release                permission for waiting ranks to exit    the watcher
interrupted            the user pressed Ctrl-C                 a rank that got SIGINT
evidence_request       the watcher needs stacks and dumps      the watcher, for the agents of other hosts
agents/                facts from the other hosts              the agent of each host (repro.hosts.agent)

The files in the last four rows, from `release` on, serve only the running job. The launcher of the lab removes these
files at the end of a run.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_moe_ref.files import MAX_JSON_BYTES as MAX_JSON_BYTES
from hybrid_moe_ref.files import DamagedFile, open_regular
from hybrid_moe_ref.files import read_json as read_json
from hybrid_moe_ref.files import write_atomically as write_atomically

RUN_NAME = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[a-z0-9_]+-(control|fault|fix)-(-?\d+)")
"""The name of a run directory of the lab: UTC time, scenario, variant, seed."""

MAX_TOKENS_BYTES = 4 << 20
MAX_TEXT_BYTES = 1 << 20

PARTS = ("events", "stacks", "fr", "logs", "env", "outputs")
COLLECTED_PARTS = ("stacks", "facts", "fr", "logs")


class OutputError(OSError):
    """An output directory or file cannot be written. The message says where, why and what to do."""


SUFFIX = ".wit"
"""Suffix of the witness file that a rank writes."""


@dataclass(frozen=True)
class RunDir:
    """The directory of one run, with the path of each file in it."""

    root: Path

    @classmethod
    def create(cls, out: Path, scenario: str, variant: str, seed: int) -> RunDir:
        """Create a new directory ``<out>/<utc>-<scenario>-<variant>-<seed>``.

        Raises OutputError if the directory cannot be created.
        """
        return cls._create(out, f"{scenario}-{variant}-{seed}", PARTS, "--out")

    @classmethod
    def create_collected(cls, out: Path, host: str) -> RunDir:
        """Create ``<out>/<utc>-collect-<host>`` for the evidence that `hmr collect` takes from a job.

        Raises OutputError if the directory cannot be created.
        """
        return cls._create(out, f"collect-{host}", COLLECTED_PARTS, "--to")

    @classmethod
    def _create(cls, out: Path, name: str, parts: Sequence[str], flag: str) -> RunDir:
        try:
            out.mkdir(parents=True, exist_ok=True)
            root = _make_unique(out.resolve(), name)
            for part in parts:
                (root / part).mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {out}: {error.strerror}; choose another folder with {flag}") from error
        return cls(root)

    def point_latest(self) -> None:
        """Point the symbolic link ``latest`` in the parent folder to this run.

        If the file system has no symbolic links, do nothing. Raises OSError if the link cannot be replaced for another
        reason; the old link then remains.
        """
        link = self.root.with_name(f".latest.{os.getpid()}")
        try:
            link.unlink(missing_ok=True)
            link.symlink_to(self.root.name)
            os.replace(link, self.root.with_name("latest"))
        except OSError as error:
            link.unlink(missing_ok=True)
            if error.errno != errno.EPERM:  # EPERM: the file system has no symbolic links; a run works without `latest`
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
        """Return the folder for compiled kernels and tuning results. The lab deletes this folder when the run ends."""
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

    @property
    def facts(self) -> Path:
        return self.root / "facts"

    def agent(self, first_rank: int) -> Path:
        return self._rank_file("agents", first_rank, "json")

    def contents(self) -> list[Path]:
        """Return the paths of the run's folder, its subfolders of evidence ("events", …), and the files in all of them.

        Files in deeper folders are left out.
        """
        folders = [self.root, *(self.root / part for part in PARTS)]
        return [path for folder in folders for path in (folder, *folder.glob("*")) if path == folder or path.is_file()]

    def describe(self, error: Exception | str) -> str:
        """Return the text of an error, in which paths are relative to the run directory.

        The text then stays correct if somebody moves the directory to another place or machine.
        """
        return str(error).replace(f"{self.root}/", "")

    @property
    def store(self) -> Path:
        """Return the file of the c10d FileStore through which the ranks of one host find each other without a port."""
        return self.root / "store"


def refuse_unwritable(path: Path, hint: str = "") -> None:
    """Raise OutputError if the file ``path`` cannot be written.

    A command calls this before it begins long work. Otherwise the command could find only at the end that it cannot
    save the result.

    hint   what the user can do, appended to the message: "; choose another --junit"
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists() and not path.is_file():
            raise OSError(None, "not a regular file")
    except OSError as error:
        raise OutputError(f"cannot write to {path}: {error.strerror}{hint}") from error


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """Write a value as indented JSON. A reader sees the old file or the whole new file.

    durable: return only after the data is on the disk, so that the data survives a crash of the machine
    """
    write_atomically(path, json.dumps(value, indent=1) + "\n", durable=durable)


def read_tokens(path: Path) -> dict[str, list[int]]:
    """Read the tokens of each request from reference.json or from the output file of a rank.

    Raises DamagedFile if the file is malformed, and OSError if the file cannot be read.
    """
    document = read_json(path, MAX_TOKENS_BYTES)
    rows = document.values() if isinstance(document, dict) else [None]
    if not all(isinstance(row, list) and all(isinstance(token, int) for token in row) for row in rows):
        raise DamagedFile(f"{path}:1: the content does not map requests to lists of tokens")
    return dict(document)


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the last ``limit`` bytes of a text file as text; "" if the file cannot be read."""
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
