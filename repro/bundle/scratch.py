"""A temporary folder that is always removed, even if a signal arrives during the removal."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Yield a new folder for a ``with`` block, and remove it at the end of the block.

    The first SIGINT, SIGTERM or SIGHUP of a command raises KeyboardInterrupt (repro.hosts.interrupt). A signal that
    arrives while the folder is created is delayed. If KeyboardInterrupt is raised during the removal, the removal is
    completed first.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        name = tempfile.mkdtemp(prefix=prefix)
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield Path(name)
        finally:
            _remove(name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove(name: str) -> None:
    try:
        shutil.rmtree(name)
    except BaseException:
        shutil.rmtree(name, ignore_errors=True)
        raise
