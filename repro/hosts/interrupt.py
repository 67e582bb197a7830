"""Handle SIGINT, SIGTERM and SIGHUP: raise where a command can stop at once, set a flag where it must finish first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PATIENCE = 3
"""Number of signals after which the process exits at once; its child processes end with it."""


class Interrupt:
    """The user's request to stop a command. Calling it returns True once a signal has arrived.

    Raises KeyboardInterrupt in the main thread at the first signal, but not inside :meth:`deferred`.
    """

    def __init__(self) -> None:
        self._signals = 0
        self._deferred = 0

    def __call__(self) -> bool:
        return self._signals > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > PATIENCE:
            os._exit(130)
        if self._signals == 1 and not self._deferred:  # a second signal must not interrupt the clean-up
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """Handle the signals inside a ``with`` block. Outside the main thread no signal is handled."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the ``with``, signals only set the flag: the code checks it, and collects evidence before it ends."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
