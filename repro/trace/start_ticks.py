"""Read the start time of a process, which distinguishes this process from a later process with the same pid."""

from __future__ import annotations


def read_start_ticks(pid: int) -> int:
    """Read the start time of a process in clock ticks since boot.

    Raises OSError if /proc/PID/stat cannot be read, ValueError or IndexError if the content of this file is malformed.
    """
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])
