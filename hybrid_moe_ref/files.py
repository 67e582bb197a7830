"""Read files that somebody else may have made, and write files into folders that somebody else may write to.

A pipe or a device in the place of a file would be read without end, a link would lead a writer to another file, and a
few hundred kilobytes of brackets can take gigabytes once they are parsed. The functions here refuse all of these first.
This module does not import torch.
"""

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 32 << 20
MAX_JSON_DEPTH = 64
MAX_JSON_MEMORY = 128 << 20
"""Bytes that a parsed document may take, as :func:`_parsed_bytes` estimates it."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_A_BRACKET = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LARGE_NUMBER = re.compile(rb"[eE]\+?0*\d{3}|\d{300}")
_ESCAPE = re.compile(rb"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(?P<lone>u[dD][89a-fA-F]..)|.)", re.DOTALL)


class DamagedFile(ValueError):
    """A file that cannot be read as what it should be; the text is "file:line: what"."""


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """Open a regular file of at most ``most`` bytes for reading.

    Raises DamagedFile with the name of what is not one, OSError for what cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        wrong = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
        if not wrong and most is not None and status.st_size > most:
            wrong = f"larger than {most} bytes"
        if not wrong:
            return descriptor
        os.close(descriptor)
        raise DamagedFile(f"{name}:0: {wrong}")

    return open(os.fspath(path), "rb", opener=opener)


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file to write in a folder that others may write to, and return its descriptor.

    flags: of ``os.open``, such as ``os.O_RDWR | os.O_CREAT``

    Raises OSError, before anything is written, where the last part of the path is not a regular file, or is a link to
    a file elsewhere.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, f"{Path(path).name} is a symbolic link", os.fspath(path)) from None
        raise
    status = os.fstat(descriptor)
    wrong = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
    if status.st_nlink > 1:
        wrong = "a hard link to a file that has another name too"
    if not wrong:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"{Path(path).name} is {wrong}", os.fspath(path))


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that readers see all of it or none, even when the writer is killed.

    durable: return when the disk has it, so that it outlives the machine's next reset as well
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    partial = _partial(path)
    try:
        partial.unlink(missing_ok=True)
        with os.fdopen(open_own(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def _partial(path: Path) -> Path:
    """The file that :func:`write_atomically` of this process writes before it takes the place of ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def room_for(path: Path, num_bytes: int) -> Iterator[None]:
    """Keep room on the disk for a file that is written at the end of a ``with`` by :func:`write_atomically`.

    Where there is no room already, none is kept.
    """
    partial = _partial(path)
    try:
        with contextlib.suppress(OSError):
            descriptor = open_own(partial, os.O_WRONLY | os.O_CREAT)
            try:
                os.posix_fallocate(descriptor, 0, num_bytes)
            finally:
                os.close(descriptor)
        yield
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when the disk has what a file, or the list of names in a folder, holds."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str | os.PathLike[str], most: int = MAX_JSON_BYTES) -> Any:
    """Read the JSON value of a regular file of at most ``most`` bytes.

    Raises DamagedFile with the file, the line where there is one, and what is wrong; OSError for what cannot be read.
    """
    with open_regular(path, most) as file:
        data = file.read(most + 1)  # the file may grow meanwhile
    if len(data) > most:
        raise DamagedFile(f"{os.fspath(path)}:0: larger than {most} bytes")
    return parse_json(data, os.fspath(path))


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON of bounded depth and size; NaN and numbers beyond a float's range are refused.

    Half a surrogate pair, which no text file can hold, becomes U+FFFD.

    where: the file, for error messages

    Raises DamagedFile.
    """
    if _parsed_bytes(data) > MAX_JSON_MEMORY:
        raise DamagedFile(f"{where}:1: more values than the {MAX_JSON_MEMORY >> 20} MiB that are read would hold")
    if _depth(data) > MAX_JSON_DEPTH:
        raise DamagedFile(f"{where}:1: nested too deep: more than {MAX_JSON_DEPTH} levels")
    if b"\\ud" in data or b"\\uD" in data:
        data = _ESCAPE.sub(lambda match: b"\\ufffd" if match["lone"] else match[0], data)
    parse_float = _finite if _LARGE_NUMBER.search(data) else None  # only there: it is slower than json's own
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, parse_float=parse_float)
    except json.JSONDecodeError as error:
        raise DamagedFile(f"{where}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise DamagedFile(f"{where}:1: not UTF-8 text") from None
    except ValueError as error:  # an integer of thousands of digits
        raise DamagedFile(f"{where}:1: {error}") from None


def _parsed_bytes(data: bytes) -> int:
    """Estimate the memory of a JSON text once it is parsed, from above: punctuation in strings counts too.

    A small list or mapping takes up to 250 bytes, a value 64, and a key with its place in the mapping 120.
    """
    containers, values, keys = data.count(b"[") + data.count(b"{"), data.count(b","), data.count(b":")
    return len(data) + 250 * containers + 64 * values + 120 * keys


def _depth(data: bytes) -> int:
    """How deep lists and mappings are nested."""
    if data.count(b"[") + data.count(b"{") <= MAX_JSON_DEPTH:
        return 0  # not deep, however they are nested
    brackets = _STRING.sub(b"", data).translate(None, _NOT_A_BRACKET)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is beyond the range of a float")
    return value
