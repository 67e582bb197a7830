"""Open a file for reading or writing, at a path where another program can have put something else.

To read from a pipe or a device can take for ever, and to write through a link would change a different file. So pipes
and devices are refused before anything is read or written, and links are refused before anything is written.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class DamagedFile(ValueError):
    """A file whose content is wrong. The text has the form "file:line: problem"."""


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """Open a regular file of at most ``most`` bytes for reading.

    Raises DamagedFile if the file is larger or not a regular file, and OSError if it cannot be opened.
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


def read_at_most(file: BinaryIO, most: int) -> bytes:
    """Read at most ``most`` bytes from the start of a file. The file must support `seek`.

    ``file.read(most)`` would allocate ``most`` bytes first, which takes longer than to read a small file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return file.read(min(size, most))


def open_own(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file for writing, in a folder that other users can write to, and return its descriptor.

    flags: those of ``os.open``, such as ``os.O_RDWR | os.O_CREAT``

    Raises OSError, before anything is written, if the last part of the path is a symbolic link, a hard link or not a
    regular file.
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
        wrong = "a file with a second name (a hard link)"
    if not wrong:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, f"{Path(path).name} is {wrong}", os.fspath(path))
