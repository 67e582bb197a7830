"""SIGINT, SIGTERM and SIGHUP: an exception where a command can simply stop, a flag where it has to finish something."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PATIENCE = 3
"""Signals after which the process ends at once; what it has started ends with it."""


class Interrupt:
    """The user's wish to end a command; true once a signal has come.

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
        if self._signals == 1 and not self._deferred:  # a second one must not interrupt the clean-up after the first
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def installed(self) -> Iterator[Interrupt]:
        """Handle the signals for the length of a ``with``; elsewhere than in the main thread nothing is handled."""
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
        """Only set the flag for the length of a ``with``: who is inside asks for it, and leaves with evidence."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
