"""Zip files from strangers: read by name from a closed list, size-bounded, never through ``extractall``."""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path

from hybrid_moe_ref.files import open_regular
from repro.report.text import visible
from repro.rundir import read_json

MAX_FILES = 20_000
MAX_FILE_BYTES = 128 << 20
MAX_TOTAL_BYTES = 1 << 30
MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 20
_NAME = re.compile(
    r"(?:(?:control|fault|fix)/)?(?:(?:events|fr|stacks|logs|env|outputs)/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,120}"
)


class ArchiveError(ValueError):
    """A zip that is refused; the text names zip and entry."""


def check_names(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The entries, if nothing about them is suspicious. Raises ArchiveError with the first that is."""
    entries = archive.infolist()
    where = archive.filename or "zip"
    if len(entries) > MAX_FILES:
        raise ArchiveError(f"{where}: {len(entries)} files, at most {MAX_FILES} are read")
    files: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    total = 0
    for entry in entries:
        name = entry.orig_filename.rstrip("/") if entry.is_dir() else entry.orig_filename
        shown = visible(name, 120)
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
            raise ArchiveError(f"{where}: {shown} is not a regular file but a link or a device")
        if entry.orig_filename.startswith(("/", "\\")) or ":" in name or "\\" in name:
            raise ArchiveError(f"{where}: {shown} is an absolute or foreign path")
        if ".." in name.split("/"):
            raise ArchiveError(f"{where}: {shown} leads out of the folder")
        if not _NAME.fullmatch(name):
            raise ArchiveError(f"{where}: {shown} is not a file of a bundle")
        folders.add(name if entry.is_dir() else name.rpartition("/")[0])
        if entry.is_dir():
            continue
        if name in files:
            raise ArchiveError(f"{where}: {shown} is in it twice")
        if entry.flag_bits & 1:
            raise ArchiveError(f"{where}: {shown} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{where}: {shown} is compressed as no bundle is")
        if entry.file_size > MAX_FILE_BYTES:
            raise ArchiveError(
                f"{where}: {shown} unpacks to {entry.file_size} bytes, at most {MAX_FILE_BYTES} are read"
            )
        files[name] = entry
        total += entry.file_size
        if total > MAX_TOTAL_BYTES:
            raise ArchiveError(
                f"{where}: up to {shown} it unpacks to {total} bytes, at most {MAX_TOTAL_BYTES} are read"
            )
    if both := sorted(files.keys() & {*folders, *(folder.partition("/")[0] for folder in folders)}):
        raise ArchiveError(f"{where}: {both[0]} is in it as a file and as a folder")
    return list(files.values())


def unpack(path: Path, into: Path) -> dict[str, str]:
    """Unpack a zip into a folder of its own; returns the SHA-256 of each file.

    Raises ValueError for what is no regular file, ArchiveError for what is no zip, is damaged, or holds anything that
    a bundle would not.
    """
    sums: dict[str, str] = {}
    if not path.exists():
        raise ArchiveError(f"{path}: no such file")
    try:
        with open_regular(path, MAX_TOTAL_BYTES) as file, zipfile.ZipFile(file) as archive:
            for entry in check_names(archive):
                target = into / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                sums[entry.filename] = _unpack_one(archive, entry, target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, UnicodeError, struct.error) as error:
        raise ArchiveError(f"{path}: not a zip that can be read: {error}") from None
    except FileExistsError as error:  # names that differ in case only, where the file system sees no difference
        raise ArchiveError(f"{path}: {Path(error.filename).name} is in it twice") from None
    return sums


def _unpack_one(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> str:
    digest, size = hashlib.sha256(), 0
    with archive.open(entry) as source, target.open("xb") as file:
        while block := source.read(_BLOCK):
            size += len(block)
            if size > entry.file_size or size > MAX_FILE_BYTES:  # the directory of a zip may lie about sizes
                raise ArchiveError(f"{archive.filename}: {entry.filename} unpacks to more than it says")
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def differences(folder: Path, sums: dict[str, str], where: str) -> list[str]:
    """What is not as MANIFEST.json says, one line each; raises ArchiveError when there is no manifest."""
    try:
        document = read_json(folder / MANIFEST)
        promised = {str(name): str(row["sha256"]) for name, row in document["files"].items()}
    except FileNotFoundError:
        raise ArchiveError(f"{where}: no {MANIFEST}: not a bundle") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ArchiveError(f"{where}: {MANIFEST} cannot be read") from None
    found = {name: digest for name, digest in sums.items() if name != MANIFEST}
    told = [f"{visible(name)} is missing" for name in promised.keys() - found.keys()]
    told += [f"{visible(name)} is not in the manifest" for name in found.keys() - promised.keys()]
    told += [f"{visible(name)} was changed" for name in promised.keys() & found.keys() if promised[name] != found[name]]
    return sorted(told)
