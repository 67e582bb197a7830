"""A temporary folder that is gone afterwards, also where a signal ends the command while the folder is removed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for the length of a ``with``. Signals arrive once, as KeyboardInterrupt (repro.hosts.interrupt)."""
    name = tempfile.mkdtemp(prefix=prefix)
    try:
        yield Path(name)
    finally:
        try:
            shutil.rmtree(name)
        except BaseException:
            shutil.rmtree(name, ignore_errors=True)
            raise
