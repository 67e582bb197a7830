"""A temporary folder that is gone afterwards, also where a signal ends the command while the folder is removed."""

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
    """A folder for the length of a ``with``. Signals arrive once, as KeyboardInterrupt (repro.hosts.interrupt).

    A signal that comes while the folder is made waits until its removal is certain.
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
