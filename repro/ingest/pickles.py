"""Load a pickle that holds data only. A stranger's pickle may name a class to run code; such a file is refused."""

from __future__ import annotations

import contextlib
import io
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOM_BYTES = 256 << 20
"""Memory that a pickle may take beside forty times its size. Nine bytes can ask for 64 GB (a memo of four billion)."""


class UnsafePickle(ValueError):
    """The pickle names a class or function. A recorder dump has none."""


class _DataOnly(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise UnsafePickle(f"it names {module_name}.{global_name}, and a recorder dump holds plain data only")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise UnsafePickle("it refers to an object outside of the file, and a recorder dump holds plain data only")


def load(data: bytes) -> Any:
    """Read a pickle of dicts, lists, tuples, strings and numbers.

    Raises UnsafePickle for a pickle that names code, ValueError for a damaged one or one that asks for much memory.
    """
    try:
        # The interpreter prints an error of its own when a bytearray of a damaged size is taken back.
        with _bounded_memory(ROOM_BYTES + 40 * len(data)), contextlib.redirect_stderr(io.StringIO()):
            # From a plain BytesIO, which cannot peek, the unpickler takes each operation by a call: four times as slow.
            return _DataOnly(io.BufferedReader(io.BytesIO(data))).load()
    except UnsafePickle:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except MemoryError:
        raise ValueError("it asks for more memory than a recorder dump needs") from None
    except Exception as error:  # the pickle module raises many kinds for damaged bytes
        raise ValueError(f"it is no readable pickle ({error})") from None


@contextlib.contextmanager
def _bounded_memory(room: int) -> Iterator[None]:
    """Let this process grow by `room` bytes at most. An allocation beyond them raises MemoryError."""
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
