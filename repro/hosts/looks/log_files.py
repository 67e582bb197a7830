"""Find the log files that the processes of a job write to, and copy them. Only regular files are read.

Of a large log, only the beginning and the end are copied. A log without any message that `diagnose` knows is left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_moe_ref.files import open_regular, write_atomically
from repro.hosts.looks.jobs import Job
from repro.hosts.looks.proc import PROC, Status
from repro.ingest.names.processes import process_of
from repro.ingest.read import read

MAX_FILES = 64
HEAD_BYTES = 4 << 20
TAIL_BYTES = 28 << 20
_OUTPUTS = (1, 2)
_TORN = b"\n... the middle of this log is left out ...\n"

File = tuple[int, int]
"""The identity of an open file: (device, inode)."""


@dataclass(frozen=True, slots=True)
class LogFile:
    """A log file to copy.

    path  a path that opens the file: its own path, or /proc/PID/fd/N of a process that writes to it
    name  the file's own name, for messages and for the copy
    rank  the rank that writes to the file; None if it is not known or if several processes write to the file
    """

    path: Path
    name: str
    rank: int | None = None


def named(paths: Sequence[Path]) -> list[LogFile]:
    """Return the log files with these paths.

    Raises OSError if a file cannot be read, and DamagedFile if it is not a regular file.
    """
    for path in paths:
        open_regular(path).close()
    return [LogFile(path, path.name) for path in paths]


def outputs_of(job: Job, table: Mapping[int, Status]) -> dict[File, LogFile]:
    """Return the regular files to which the job's processes and their ancestors print (standard output or error).

    The keys are (device, inode). A file to which this process or one of its ancestors writes is left out, because the
    file contains the output of `collect`.

    table: all processes of this host, by pid
    """
    own = {file for pid in _with_parents([os.getpid()], table) for file, _, _ in _outputs(pid)}
    writers: dict[File, set[int | None]] = {}
    logs: dict[File, LogFile] = {}
    ranks = {member.pid: member.rank for member in job.members}
    for pid in [*job.pids, *_with_parents([row.parent for p in job.pids if (row := table.get(p))], table)]:
        for file, path, name in _outputs(pid):
            if file not in own:
                logs.setdefault(file, LogFile(path, name))
                writers.setdefault(file, set()).add(ranks.get(pid))
    known = {file: next(iter(found)) for file, found in writers.items() if len(found) == 1}
    return {file: LogFile(log.path, log.name, known.get(file)) for file, log in list(logs.items())[:MAX_FILES]}


def is_written_by(path: Path, job: Job, table: Mapping[int, Status]) -> bool:
    """Whether a process of the job, or one of its ancestors, writes its standard output or error to this file.

    table: all processes of this host, by pid
    """
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_dev, status.st_ino) in outputs_of(job, table)


def copy_logs(logs: Iterable[LogFile], folder: Path) -> list[str]:
    """Copy into the folder each log that has a message that `diagnose` knows.

    Returns a sentence for each log that could not be read. Raises OSError if a copy cannot be written.
    """
    failed = []
    for log in logs:
        try:
            data = _beginning_and_end(log.path)
        except (OSError, ValueError) as error:
            failed.append(f"the log {log.name}: {getattr(error, 'strerror', None) or error}")
            continue
        target = _free(folder, log)
        write_atomically(target, data)
        if not read([target]).records:
            target.unlink()
    return failed


def _with_parents(pids: Iterable[int], table: Mapping[int, Status]) -> Iterator[int]:
    seen = set()
    for pid in pids:
        while pid > 1 and pid in table and pid not in seen:
            seen.add(pid)
            yield pid
            pid = table[pid].parent


def _outputs(pid: int) -> Iterator[tuple[File, Path, str]]:
    """Yield the regular files to which standard output and standard error of a process go.

    For each file: (device, inode), a path below /proc that opens the file, and its name.
    """
    for descriptor in _OUTPUTS:
        path = PROC / str(pid) / "fd" / str(descriptor)
        try:
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield (status.st_dev, status.st_ino), path, os.path.basename(os.readlink(path))
        except OSError:
            continue


def _beginning_and_end(path: Path) -> bytes:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= HEAD_BYTES + TAIL_BYTES:
            return file.read(HEAD_BYTES + TAIL_BYTES)
        head = file.read(HEAD_BYTES)
        file.seek(size - TAIL_BYTES)
        file.readline()
        return head + _TORN + file.read(TAIL_BYTES)


def _free(folder: Path, log: LogFile) -> Path:
    """Return an unused path in the folder for a copy of a log. If one rank writes the log, the name has this rank."""
    base = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in log.name)[-80:].lstrip(".")
    if log.rank is not None and process_of(file=base).rank is None:
        base = f"rank_{log.rank}_{base}"
    names = (base if number == 0 else f"{number}-{base}" for number in range(MAX_FILES * 2))
    return next(path for name in names if not (path := folder / name).exists())
