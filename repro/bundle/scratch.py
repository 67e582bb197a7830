"""A temporary folder that is gone when the process is asked to end, too."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A folder for the length of a ``with``. SIGTERM and SIGHUP raise SystemExit in it, with 128 + the signal's number.

    Signals can be handled in the main thread alone; in another one only the folder is made. A handler that somebody
    has installed stays.
    """

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handled = [
        number
        for number in _ENDING
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == signal.SIG_DFL
    ]
    for number in handled:
        signal.signal(number, end)
    try:
        with tempfile.TemporaryDirectory(prefix=prefix) as name:
            yield Path(name)
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
