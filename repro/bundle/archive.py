"""Write and read bundles as zip files. Equal files give an equal zip, and a zip from outside is not trusted.

Only files whose names a bundle can have are read, up to a size limit. ``extractall`` is never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import InputError
from hybrid_moe_ref.files import DamagedFile, open_regular, read_json
from repro.bundle.scratch import scratch_folder
from repro.store.text import escape_control_characters
from repro.trace.witness.parse import WitnessError

MAX_FILES = 20_000
MAX_FILE_BYTES = 128 << 20
MAX_TOTAL_BYTES = 1 << 30
MAX_RATIO, MIN_RATED_BYTES, MIN_RATED_TOTAL = 200, 4 << 20, 64 << 20
"""Limits against a zip of some kilobytes that unpacks to gigabytes.

MAX_RATIO is the largest allowed ratio of unpacked to compressed size. An entry without a limit in LIMITS is checked if
it unpacks to more than MIN_RATED_BYTES, and the whole zip if it unpacks to more than MIN_RATED_TOTAL. Unpacked files of
a run are 5 to 40 times as large as their entries. A damaged witness, which cannot be shortened, has 3 MB.
"""

LIMITS = (
    (r"(?:.*/)?config\.json|(?:.*/)?env/.*", 1 << 20),
    (r"(?:.*/)?(?:outputs|stacks|logs)/.*", 4 << 20),
    (r"(?:.*/)?(?:verdict|reference|MANIFEST)\.json", 16 << 20),
    (r"(?:.*/)?fr/.*", 32 << 20),
    (r"records\.jsonl", 128 << 20),
)
"""(pattern of the name, largest size in bytes) for files that are parsed or shown as a whole.

For all other files the limit is MAX_FILE_BYTES.
"""
MANIFEST = "MANIFEST.json"
_BLOCK = 1 << 20
_NAME = re.compile(
    r"(?:(?:control|fault|fix)/)?(?:(?:events|fr|stacks|logs|env|outputs)/)?[A-Za-z0-9][A-Za-z0-9_.-]{0,120}"
)


class ArchiveError(ValueError):
    """A zip that is refused. The text of the error names the zip and the file in it."""


def check_entries(archive: zipfile.ZipFile, where: str) -> list[zipfile.ZipInfo]:
    """Return the files of a zip. Raises ArchiveError if the zip does not look like a bundle.

    A zip is refused if it has a file with a name that no bundle has, a link, an encrypted file, or two files of one
    name; also if its files are too many or too large.

    where: the name of the zip for error messages
    """
    entries = archive.infolist()
    if len(entries) > MAX_FILES:
        raise ArchiveError(f"{where}: the zip has {len(entries)} files, but at most {MAX_FILES} are allowed")
    files: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    total = 0
    for entry in entries:
        if not entry.filename:  # the zipfile module reads the last letter of a name, and fails on an empty one
            raise ArchiveError(f"{where}: the zip has an entry without a name")
        name = entry.orig_filename.rstrip("/") if entry.is_dir() else entry.orig_filename
        shown = escape_control_characters(name, 120)
        mode = entry.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFDIR if entry.is_dir() else stat.S_IFREG):
            raise ArchiveError(f"{where}: {shown} is not a regular file but a link or a device")
        if not _NAME.fullmatch(name):  # this also refuses absolute paths and paths that lead out of the folder
            raise ArchiveError(f"{where}: {shown} is not a file of a bundle")
        folders.add(name if entry.is_dir() else name.rpartition("/")[0])
        if entry.is_dir():
            continue
        if name in files:
            raise ArchiveError(f"{where}: {shown} is in the zip twice")
        if entry.flag_bits & 1:
            raise ArchiveError(f"{where}: {shown} is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ArchiveError(f"{where}: {shown} is compressed by a method that bundles do not use")
        limit = next((limit for form, limit in LIMITS if re.fullmatch(form, name)), None)
        if entry.file_size > (most := limit or MAX_FILE_BYTES):
            raise ArchiveError(f"{where}: {shown} unpacks to {entry.file_size} bytes, but at most {most} are allowed")
        if limit is None and entry.file_size > max(MIN_RATED_BYTES, MAX_RATIO * entry.compress_size):
            raise ArchiveError(f"{where}: {shown} unpacks to more than {MAX_RATIO} times its size")
        files[name] = entry
        total += entry.file_size
        if total > MAX_TOTAL_BYTES:
            raise ArchiveError(
                f"{where}: the entries up to {shown} unpack to {total} bytes, but at most {MAX_TOTAL_BYTES} are allowed"
            )
    if total > max(MIN_RATED_TOTAL, MAX_RATIO * sum(entry.compress_size for entry in files.values())):
        raise ArchiveError(f"{where}: the zip unpacks to more than {MAX_RATIO} times its size")
    if both := sorted(files.keys() & {*folders, *(folder.partition("/")[0] for folder in folders)}):
        raise ArchiveError(f"{where}: {both[0]} is in the zip both as a file and as a folder")
    return list(files.values())


def unpack(path: Path, into: Path) -> dict[str, str]:
    """Unpack a zip into the folder `into`. Returns a dict from the name of each unpacked file to its SHA-256.

    Raises ArchiveError if `path` does not exist, is not a zip, is damaged, or contains anything that a bundle cannot
    contain. Raises ValueError if `path` is not a regular file.
    """
    sums: dict[str, str] = {}
    if not path.exists():
        raise ArchiveError(f"{path}: no such file")
    try:
        with open_regular(path, MAX_TOTAL_BYTES) as file, zipfile.ZipFile(file) as archive:
            for entry in check_entries(archive, str(path)):
                target = into / entry.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                sums[entry.filename] = _unpack_one(archive, entry, target)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, UnicodeError, struct.error) as error:
        raise ArchiveError(f"{path}: the zip cannot be read: {error}") from None
    except FileExistsError as error:  # names that differ only in case are one file on some file systems
        raise ArchiveError(f"{path}: {Path(error.filename).name} is in the zip twice") from None
    return sums


def _unpack_one(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> str:
    digest, size = hashlib.sha256(), 0
    with archive.open(entry) as source, target.open("xb") as file:
        while block := source.read(_BLOCK):
            size += len(block)
            if size > entry.file_size or size > MAX_FILE_BYTES:  # a zip's directory may state wrong sizes
                raise ArchiveError(
                    f"{archive.filename}: {entry.filename} unpacks to more bytes than the zip's directory says"
                )
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def differences(folder: Path, sums: dict[str, str], where: str) -> list[str]:
    """Return a line for each file that is missing, changed or not in MANIFEST.json, the list of all files.

    folder: an unpacked bundle, with its MANIFEST.json
    sums: a dict from the name of each unpacked file to its SHA-256
    where: the name of the zip for error messages

    Raises ArchiveError if MANIFEST.json is missing or damaged.
    """
    try:
        document = read_json(folder / MANIFEST)
        promised = {str(name): str(row["sha256"]) for name, row in document["files"].items()}
    except FileNotFoundError:
        raise ArchiveError(f"{where}: the zip is not a bundle, because it has no {MANIFEST}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ArchiveError(f"{where}: {MANIFEST} cannot be read") from None
    found = {name: digest for name, digest in sums.items() if name != MANIFEST}
    problems = [f"{escape_control_characters(name)} is missing" for name in promised.keys() - found.keys()]
    problems += [f"{escape_control_characters(name)} is not in the manifest" for name in found.keys() - promised.keys()]
    problems += [
        f"{escape_control_characters(name)} was changed"
        for name in promised.keys() & found.keys()
        if promised[name] != found[name]
    ]
    return sorted(problems)


def verify(path: Path) -> list[str]:
    """Return a line for each file of a bundle that differs from MANIFEST.json, its list of files and their SHA-256.

    Raises ArchiveError if the zip is not a bundle or not safe to open.
    """
    with scratch_folder("repro-verify-") as folder:
        return differences(folder, unpack(path, folder), str(path))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Path]:
    """Yield ``path`` if it is a folder; if it is a bundle, yield a temporary folder with the bundle's content.

    The temporary folder is removed at the end of the ``with`` block. Raises ArchiveError for a zip that is not a
    bundle, is not safe to open, or differs from its manifest. If the ``with`` block raises an error about an unusable
    file in the bundle, this error is raised as ArchiveError, too.
    """
    if not path.is_file():
        yield path
        return
    with scratch_folder("repro-bundle-") as folder:
        if wrong := differences(folder, unpack(path, folder), str(path)):
            raise ArchiveError(f"{path}: {wrong[0]}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
        try:
            yield folder
        # The error's text names a temporary folder that no longer exists.
        except (InputError, DamagedFile, WitnessError) as error:
            raise ArchiveError(str(error).replace(f"{folder}/", f"{path}: ")) from error


def pack(folder: Path, path: Path, manifest: Mapping[str, Any]) -> int:
    """Write all files of a folder into a zip, and a MANIFEST.json. Returns the size of the zip in bytes.

    manifest: the content of MANIFEST.json, without the list of files, which is added here

    Raises ArchiveError if the zip would be too large for the commands that read bundles, OSError if it cannot be
    written.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [str(file.relative_to(folder)) for file in files]
    rows = {
        name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for name, file in zip(names, files, strict=True)
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, file in zip(names, files, strict=True):
                _add(archive, name, file.read_bytes())
            _add(archive, MANIFEST, (json.dumps({**manifest, "files": rows}, indent=1) + "\n").encode())
        with zipfile.ZipFile(partial) as archive:
            check_entries(archive, str(path))  # do not write a bundle that no reader would accept
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Add a file to the zip, always with the same modification time, so that equal files give an equal zip."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.external_attr = (0o755 if name.endswith((".sh", ".py")) else 0o644) << 16
    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
