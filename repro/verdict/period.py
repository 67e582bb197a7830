"""The period of a sequence that ends in a repeating pattern, such as the operations of the steps of a job."""

from __future__ import annotations

from collections.abc import Sequence

MIN_REPEATS = 2
MIN_COVERED = 8
MAX_PERIOD = 512


def period_of(past: Sequence[object]) -> int | None:
    """Return the period that explains the longest end of the history; None if that end is too short.

    It must contain MIN_REPEATS periods, MIN_COVERED operations and half of the history. Operations that a job issues
    once at its start have no period.
    """
    best, covered = None, 0
    for period in range(1, min(MAX_PERIOD, len(past) // MIN_REPEATS) + 1):
        length = period
        while length < len(past) and past[-1 - length] == past[-1 - length + period]:
            length += 1
        if length > covered and length >= MIN_REPEATS * period:
            best, covered = period, length
        if covered == len(past):
            break
    return best if covered >= MIN_COVERED and covered * 2 >= len(past) else None
