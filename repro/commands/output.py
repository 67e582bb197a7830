"""Standard output and standard error that never end a command.

A run must reach its verdict whatever becomes of the text about it: the reader of a pipe may leave (``| head -1``), the
disk that a log is on may fill up, and a shell may start the program without the files (``>&-``).
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable


class Output(io.TextIOWrapper):
    """A text stream on a file descriptor that drops its text once the descriptor takes no more.

    error   why, None while it does
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
        """Lead the descriptor to nowhere, with what is still buffered."""
        self.error = self.error or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        super().flush()


def open_standard_files() -> None:
    """Open what of standard input, output and error is closed: the next file opened would take its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def guarded(command: Callable[[], int], cannot_tell: int) -> int:
    """Run a command whose output may fail, and return its exit code.

    cannot_tell: the exit code where standard output failed, other than by a reader that left, and so did not say what
    it should have
    """
    out, sys.stderr = Output(1), Output(2)
    sys.stdout = out
    try:
        code = command()
    except SystemExit as usage:  # of the parser, which has said why
        code = int(usage.code or 0)
    out.flush()
    if out.error is None or out.error.errno == errno.EPIPE:
        return code
    print(f"repro: standard output: {out.error.strerror}", file=sys.stderr)
    return code if code > 1 else cannot_tell
