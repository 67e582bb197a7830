"""Take the stacks of processes by sending a signal: the program's faulthandler then writes the stacks.

The signal is sent only if the user names it, because the program's handler for this signal could do other things, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from repro.hosts.looks.proc import PROC, read_status

PATIENCE_S = 1.0
MAX_BYTES = 4 << 20


def stacks_by_signal(pids: Sequence[int], number: int) -> dict[int, bytes]:
    """Send the signal ``number`` to the processes that handle it. Returns what faulthandler then wrote, by pid.

    faulthandler writes to standard error, which can be read only if it goes to a regular file. Otherwise the process
    gets no signal.
    """
    before = {pid: (path, _size(path)) for pid in pids if (path := _error_file(pid, number)) is not None}
    for pid in before:
        os.kill(pid, number)
    deadline = time.monotonic() + PATIENCE_S
    texts: dict[int, bytes] = {}
    while len(texts) < len(before) and time.monotonic() < deadline:
        time.sleep(0.05)
        for pid, (path, size) in before.items():
            text = _read_from(path, size)
            if b"most recent call first" in text:
                texts[pid] = text
    return texts


def _error_file(pid: int, number: int) -> Path | None:
    """Return the file to which a process's standard error goes.

    Return None if standard error does not go to a regular file, or if the process has no handler for the signal.
    """
    status = read_status(pid)
    path = PROC / str(pid) / "fd" / "2"
    try:
        return path if status is not None and number in status.caught and path.is_file() else None
    except OSError:
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(MAX_BYTES)
    except OSError:
        return b""
