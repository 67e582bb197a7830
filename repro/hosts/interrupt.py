"""Handle SIGINT, SIGTERM and SIGHUP in a command: raise KeyboardInterrupt, or only note the signal.

The signal is only noted if it arrives while the command does work that must be finished.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

PATIENCE = 3
"""One more signal than this ends the process at once, and its child processes end with it."""


class Interrupt:
    """The user's request to stop a command. A call of this object returns whether a signal has arrived.

    The first signal raises KeyboardInterrupt in the main thread, unless the signal arrives inside :meth:`deferred`.
    Later signals are only counted. After PATIENCE signals, the next one ends the process at once.
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
        """Handle the signals inside a ``with`` block. Outside the main thread, handle none of them."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a process under nohup ignores SIGHUP
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise no KeyboardInterrupt inside the ``with`` block.

        The code in the block calls this object to learn whether a signal has arrived. So the command can finish its
        work, for example collect evidence, before it ends.
        """
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
