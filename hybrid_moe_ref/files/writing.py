"""Write a file so that readers see either the whole file or nothing of it, even if the writer is killed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hybrid_moe_ref.files.opening import open_own


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a file so that readers see either all of `content` or nothing of it, even if the writer is killed.

    durable: return only after the data is on the disk, so that the data survives a crash of the machine

    Raises OSError.
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
    """Return the path of the temporary file that :func:`write_atomically` writes and then renames to ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def room_for(path: Path, num_bytes: int) -> Iterator[None]:
    """Reserve disk space for a file that :func:`write_atomically` writes as the last action in the ``with`` block.

    The space is released when this function begins to write, or at the end of the block. If no space can be reserved,
    for example because the disk is full, the block runs without a reservation, and no error is raised.
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
    """Write the content of a file, or the list of files in a folder, to the disk before returning."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
