"""Write a file so that readers see all of it or nothing, even when the writer is killed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from hybrid_moe_ref.files.opening import open_own


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
