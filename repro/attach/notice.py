"""Lines for the standard error of a process that is not ours."""

from __future__ import annotations

import contextlib
import sys


def notice(text: str) -> None:
    """Write ``text`` and the end of its line to standard error at once.

    The ranks of a job share a log. ``print`` writes a line in two parts, so lines of two ranks can mix: always if
    PYTHONUNBUFFERED is set, as containers do, and between threads.
    An error of the stream (closed, a full disk, a reader that has ended) is ignored: the program must not see it.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
