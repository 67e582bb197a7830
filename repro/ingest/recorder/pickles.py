"""Load a pickle, but only if it contains plain data. A pickle that names a class or function could run code."""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hybrid_moe_ref.files import DamagedFile

ROOM_BYTES = 256 << 20
"""The limit of the memory for loading a pickle is this plus forty times the size of the file. Without a limit, a pickle
of nine bytes can request 64 GB."""


class UnsafePickle(DamagedFile):
    """The pickle names a class or function. A Flight Recorder dump names none, so the file is possibly an attack."""


class _DataOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise _NamesCode(
            f"the pickle names {module_name[:80]}.{global_name[:80]}, but a recorder dump contains plain data only"
        )

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise _NamesCode(
            "the pickle refers to an object outside the file, but a recorder dump contains plain data only"
        )


class _NamesCode(Exception):
    """The pickle is not plain data. `load` converts this exception to UnsafePickle, whose message has the offset."""


def load(data: bytes, where: str) -> Any:
    """Read a pickle of dicts, lists, tuples, strings and numbers.

    where: the name of the file for messages

    Raises UnsafePickle if the pickle names a class or function, and DamagedFile if the pickle is damaged or requests
    too much memory. The message is "file:offset: problem"; the problem is at this offset or shortly after it.
    """
    raw = io.BytesIO(data)
    # The file must have the method `peek`. Without it, the unpickler calls `read` for every operation, and takes four
    # times as long.
    file = io.BufferedReader(raw, 1 << 16)
    kind, what = DamagedFile, ""
    try:
        # stderr is redirected, because the interpreter prints an error when it frees a bytearray of a wrong size.
        with _bounded_memory(ROOM_BYTES + 40 * len(data)), contextlib.redirect_stderr(io.StringIO()):
            return _DataOnly(file).load()
    except _NamesCode as error:
        kind, what = UnsafePickle, str(error)
    except RecursionError:
        what = "the pickle is nested too deeply"
    except MemoryError:
        what = "the pickle requests more memory than a recorder dump needs"
    except Exception as error:  # the pickle module raises many types of exceptions for damaged bytes
        what = f"the pickle cannot be read ({error})"
    raise kind(f"{where}:{file.tell()}: {what}")


@contextlib.contextmanager
def _bounded_memory(room: int) -> Iterator[None]:
    """Let this process allocate at most `room` more bytes. A larger allocation raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + room
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
