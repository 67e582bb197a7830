"""Read files, folders and zips of evidence in any combination. The content of a file decides how it is read.

The result also lists the files that were not understood, each with the reason.
"""

from __future__ import annotations

import gc
import io
import lzma
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hybrid_moe_ref.files import open_regular, read_at_most
from repro.ingest.formats import FILES
from repro.ingest.join import join
from repro.ingest.logs import log
from repro.ingest.shares import Share, read_shares
from repro.trace.foreign.records import Observation

HEAD_BYTES = 65_536
MAX_STRUCTURED_BYTES = 64 << 20
MAX_LOG_BYTES = 64 << 30
MAX_UNPACKED_BYTES = 512 << 20
MAX_FILES = 20_000
MAX_NAME = 300
# Files that `collect` and `diagnose --out` write beside the evidence.
_PASSED_OVER = {
    "expect.json", "run.json", "report.html", "ISSUE.md", "diagnosis.json", "verdict.json", "records.jsonl"
}  # fmt: skip
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
    NotImplementedError, RuntimeError, EOFError, OSError, ValueError, OverflowError, KeyError, IndexError,
)  # fmt: skip


@dataclass
class Evidence:
    """The result of reading files of evidence.

    records          what the files show, as types of `repro.trace.foreign.records`
    files            the names of the files that were understood
    not_understood   "file:offset: why" for each file that was not understood
    """

    records: list[Observation] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)

    def joined(self, other: Evidence) -> Evidence:
        """Join two sets of evidence. A record that lacks its rank can get the rank from a record of the other set."""
        return Evidence(
            join([*self.records, *other.records]), self.files + other.files, self.not_understood + other.not_understood
        )


def read(paths: Sequence[Path]) -> Evidence:
    """Read all files under the paths. A damaged file raises no error, but is listed in `Evidence.not_understood`."""
    evidence = Evidence()
    collecting = gc.isenabled()
    gc.disable()  # reading creates no reference cycles, and a search for them would take as long as the reading
    try:
        files = [file for path in paths for file in _files_under(path, evidence)]
        for part in read_shares(files, _read_share):
            evidence.records += part.records
            evidence.files += part.files
            evidence.not_understood += part.not_understood
        evidence.records = join(evidence.records)
    finally:
        gc.freeze()  # later garbage collections then need not scan the records, which is slow
        if collecting:
            gc.enable()
    return evidence


def _read_share(files: Share) -> Evidence:
    evidence = Evidence()
    for path, name in files:
        read_files(_opened(path, name, evidence), evidence)
    return evidence


def read_files(files: Iterable[tuple[str, BinaryIO]], evidence: Evidence) -> None:
    """Add what open files show to the evidence, and close the files. files: (name for messages, open file) of each."""
    for name, file in files:
        try:
            with file:
                records = _records(file, name)
        except (OSError, ValueError) as error:
            evidence.not_understood.append(_refusal(name, error))
            continue
        if records:
            evidence.files.append(name)
            evidence.records += records
        else:
            evidence.not_understood.append(f"{name}:0: no line or record of a format that this program can read")


def _refusal(name: str, error: Exception) -> str:
    """Return a line about a file that was not understood: "file:offset: why"."""
    text = str(error.strerror or error) if isinstance(error, OSError) else str(error)
    return text if re.match(rf"{re.escape(name)}:\d+: ", text) else f"{name}:0: {_without_place(text)}"


def _without_place(text: str) -> str:
    return re.sub(r"^.*?:\d+: ", "", text, count=1)


def _files_under(path: Path, evidence: Evidence) -> list[tuple[Path, str]]:
    """Return (path, name for messages) of a file, or of each file in a folder and its subfolders.

    In a folder, symbolic links are not followed, but listed in ``evidence.not_understood``.
    """
    if not path.is_dir():
        return [(path, path.name)]
    members = sorted(member for member in path.rglob("*") if member.name not in _PASSED_OVER)
    read = [member for member in members if member.is_symlink() or not member.is_dir()]
    if len(read) > MAX_FILES:
        evidence.not_understood.append(
            f"{path.name}:0: {len(read)} files; only the first {MAX_FILES} are read: give a smaller folder"
        )
    files = []
    for member in read[:MAX_FILES]:
        name = str(member.relative_to(path))
        if member.is_symlink():
            evidence.not_understood.append(f"{name}:0: a symbolic link, which is not followed: give the file itself")
        else:
            files.append((member, name))
    return files


def _opened(path: Path, name: str, evidence: Evidence) -> Iterator[tuple[str, BinaryIO]]:
    try:
        file = open_regular(path, MAX_LOG_BYTES)
        start = file.read(4)
        file.seek(0)
    except (OSError, ValueError) as error:
        evidence.not_understood.append(_refusal(name, error))
        return
    if start == b"PK\x03\x04":
        with file:
            yield from _zipped(file, name, evidence)
    else:
        yield name, file


def _zipped(file: BinaryIO, name: str, evidence: Evidence) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, content) of each readable file in a zip. List the other files in ``evidence.not_understood``."""
    try:
        archive = zipfile.ZipFile(file)
    except _ZIP_ERRORS as error:
        evidence.not_understood.append(f"{name}:0: no readable zip ({error})")
        return
    room = MAX_UNPACKED_BYTES
    for member in archive.infolist()[:MAX_FILES]:
        if not member.filename:  # the zipfile module reads the last letter of a name, and fails on an empty one
            evidence.not_understood.append(f"{name}:{max(member.header_offset, 0)}: an entry without a name")
            continue
        if member.is_dir() or Path(member.filename).name in _PASSED_OVER:
            continue
        inner = f"{name}/{member.filename[:MAX_NAME]}"
        try:
            with archive.open(member) as content:
                data = content.read(min(room, MAX_STRUCTURED_BYTES) + 1)
        except _ZIP_ERRORS as error:
            evidence.not_understood.append(f"{inner}:{max(member.header_offset, 0)}: not readable ({error})")
            continue
        room -= len(data)
        if room < 0:
            most = MAX_UNPACKED_BYTES >> 20
            evidence.not_understood.append(
                f"{inner}:0: the zip unpacks to more than {most} MiB; the rest is not read: "
                "unpack the zip and give a part of it"
            )
            return
        if len(data) > MAX_STRUCTURED_BYTES:
            most = MAX_STRUCTURED_BYTES >> 20
            evidence.not_understood.append(
                f"{inner}:0: the file is larger than {most} MiB: unpack the zip and give the folder"
            )
        else:
            yield inner, io.BytesIO(data)


def _records(file: BinaryIO, name: str) -> list[Observation]:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    for form in FILES:
        if form.recognises(name, head):
            records = form.read(_whole(file), name)
            if records is not None:
                return list(records)
            file.seek(0)
    if b"\0" in head[:4096]:
        raise ValueError("a binary file of a format that this program cannot read")
    return list(log.read(file, name))


def _whole(file: BinaryIO) -> bytes:
    data = read_at_most(file, MAX_STRUCTURED_BYTES + 1)
    if len(data) > MAX_STRUCTURED_BYTES:
        raise ValueError(f"the file is larger than {MAX_STRUCTURED_BYTES >> 20} MiB")
    return data
