"""Read the start time of a process. It distinguishes the process from a later one with the same pid."""

from __future__ import annotations


def read_start_ticks(pid: int) -> int:
    """Read the start time of a process in clock ticks since boot.

    Raises OSError if /proc cannot be read, ValueError or IndexError if its content is malformed.
    """
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])
