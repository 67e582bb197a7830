"""Files that others left are opened only if they are files: a pipe of that name would be waited for without end."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str], most: int | None = None) -> BinaryIO:
    """Open to read what is a regular file, of at most ``most`` bytes.

    Raises ValueError naming what is none, OSError for what cannot be opened.
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
        raise ValueError(f"{name}:0: {wrong}")

    return open(os.fspath(path), "rb", opener=opener)
