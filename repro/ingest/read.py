"""Read files, folders and zips in any mixture; recognise each by its content; list what was not understood."""

from __future__ import annotations

import gc
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hybrid_moe_ref.files import open_regular
from repro.ingest import flight_recorder, logs, ras, stacks
from repro.ingest.join import join
from repro.trace.observed import Observation

MAX_STRUCTURED_BYTES = 64 << 20
MAX_LOG_BYTES = 64 << 30
MAX_FILES = 20_000
_PASSED_OVER = {"expect.json"}


@dataclass
class Evidence:
    """What was read: the records, the files they came from, and what could not be used ("file: why")."""

    records: list[Observation] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    not_understood: list[str] = field(default_factory=list)


def read(paths: Sequence[Path]) -> Evidence:
    """Everything readable under the paths. Raises nothing for a bad file: it is listed."""
    evidence = Evidence()
    collecting = gc.isenabled()
    gc.disable()  # no cycles are made, and to look for them takes as long as to read
    try:
        _read_all(paths, evidence)
        evidence.records = join(evidence.records)
    finally:
        gc.freeze()  # the judgement makes garbage enough for collections, which need not walk millions of calls
        if collecting:
            gc.enable()
    return evidence


def _read_all(paths: Sequence[Path], evidence: Evidence) -> None:
    for path in paths:
        for name, file in _files(path, evidence):
            try:
                with file:
                    records = _records(file, name)
            except (OSError, ValueError) as error:
                evidence.not_understood.append(f"{name}: {error}")
                continue
            if records:
                evidence.files.append(name)
                evidence.records += records
            else:
                evidence.not_understood.append(f"{name}: no line or record of a format that is known")


def _files(path: Path, evidence: Evidence) -> Iterator[tuple[str, BinaryIO]]:
    if path.is_dir():
        members = sorted(
            p for p in path.rglob("*") if p.is_file() and not p.is_symlink() and p.name not in _PASSED_OVER
        )
        if len(members) > MAX_FILES:
            evidence.not_understood.append(f"{path}: {len(members)} files; the first {MAX_FILES} are read")
        for member in members[:MAX_FILES]:
            yield from _opened(member, str(member.relative_to(path)), evidence)
    else:
        yield from _opened(path, path.name, evidence)


def _opened(path: Path, name: str, evidence: Evidence) -> Iterator[tuple[str, BinaryIO]]:
    try:
        file = open_regular(path, MAX_LOG_BYTES)
    except (OSError, ValueError) as error:
        evidence.not_understood.append(f"{name}: {error}")
        return
    if file.read(4) == b"PK\x03\x04":
        with file:
            yield from _zipped(file, name, evidence)
        return
    file.seek(0)
    yield name, file


def _zipped(file: BinaryIO, name: str, evidence: Evidence) -> Iterator[tuple[str, BinaryIO]]:
    total = 0
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist()[:MAX_FILES]:
                total += member.file_size
                if member.is_dir() or Path(member.filename).name in _PASSED_OVER:
                    continue
                if total > MAX_STRUCTURED_BYTES:
                    evidence.not_understood.append(
                        f"{name}: it unpacks to more than {MAX_STRUCTURED_BYTES >> 20} MiB; the rest is left out"
                    )
                    return
                with archive.open(member) as content:
                    yield f"{name}/{member.filename}", io.BytesIO(content.read(MAX_STRUCTURED_BYTES))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        evidence.not_understood.append(f"{name}: no readable zip ({error})")


def _records(file: BinaryIO, name: str) -> list[Observation]:
    head = file.read(65_536)
    file.seek(0)
    if flight_recorder.looks_like(head):
        try:
            return [flight_recorder.read(_whole(file), name)]
        except flight_recorder.NotARecorderDump:
            file.seek(0)
    if head.lstrip()[:1] in (b"{", b"["):
        content = stacks.as_json(_whole(file))
        if stacks.looks_like_json(content):
            return list(stacks.read_json(content, name))
        if ras.looks_like_json(content):
            return list(ras.read_json(content, name))
        file.seek(0)
    text = head.decode("utf-8", errors="replace")
    if "\0" in text[:4096]:
        raise ValueError("a binary file of a format that is not known")
    if ras.looks_like(text):
        return list(ras.read(_whole(file).decode("utf-8", errors="replace").splitlines(), name))
    if note := ras.no_answer(name, text):
        return [note]
    return list(logs.read(file, name))


def _whole(file: BinaryIO) -> bytes:
    data = file.read(MAX_STRUCTURED_BYTES + 1)
    if len(data) > MAX_STRUCTURED_BYTES:
        raise ValueError(f"larger than {MAX_STRUCTURED_BYTES >> 20} MiB")
    return data
