"""Lines for the standard error of a process that is not ours."""

from __future__ import annotations

import contextlib
import sys


def notice(text: str) -> None:
    """Write ``text`` and a newline to standard error, in one write.

    ``print`` writes the text and the newline separately. So the lines of two threads could mix. If PYTHONUNBUFFERED is
    set, which is usual in containers, the lines of two ranks that share a log could mix, too.

    No error of the stream reaches the program: it may be closed, its disk full, or an object without ``flush``.
    """
    if sys.stderr is not None:
        with contextlib.suppress(Exception):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()
