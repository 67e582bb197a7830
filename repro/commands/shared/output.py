"""Replace standard output and standard error by streams on which a failed write does not end the command.

A run must reach its verdict even if its output cannot be written. For example, the reader of a pipe exits
(``| head -1``), the disk with the redirected output becomes full, or a shell starts the program with closed files
(``>&-``).
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable


class Output(io.TextIOWrapper):
    """A text stream on a file descriptor. After the first failed write it drops all further text.

    error   the error of the first failed write; None while writes succeed
    """

    def __init__(self, descriptor: int) -> None:
        raw = io.FileIO(descriptor, "w", closefd=False)
        encoding = (sys.__stdout__ or sys.__stderr__ or io.TextIOWrapper(io.BytesIO())).encoding
        super().__init__(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=True)
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """Redirect the descriptor to /dev/null for ever, and flush the buffered text into it."""
        self.error = self.error or error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        super().flush()


def open_standard_files() -> None:
    """Open /dev/null for each closed standard file (0 to 2), so that no file opened later gets this descriptor."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # opens as the lowest descriptor that is free


def guarded(command: Callable[[], int], cannot_tell: int) -> int:
    """Run a command so that a failed write to standard output does not end it. Returns the exit code.

    cannot_tell: the exit code to return instead of 0 or 1 if a write to standard output failed, because the printed
    result is then incomplete. It is not returned if the reader of a pipe exited, because that is the reader's decision.
    """
    out, sys.stderr = Output(1), Output(2)
    sys.stdout = out
    try:
        code = command()
    except SystemExit as usage:  # raised by the argument parser, which has printed the error
        code = int(usage.code or 0)
    out.flush()
    if out.error is None or out.error.errno == errno.EPIPE:
        return code
    print(f"repro: standard output: {out.error.strerror}", file=sys.stderr)
    return code if code > 1 else cannot_tell
