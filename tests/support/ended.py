"""Whether a process has ended that a test did not start itself: some other process reaps it, at any time."""

from __future__ import annotations

import time
from pathlib import Path

LIMIT_S = 60


def has_ended(pid: int) -> bool:
    """Wait until the process has ended; False if it still runs after LIMIT_S. A zombie has ended."""
    until = time.monotonic() + LIMIT_S
    while runs(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False
