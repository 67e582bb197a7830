"""Find the period of a sequence that ends in a repeating pattern: A B C A B C A B has the period 3.

The steps of a job repeat their operations in this way.
"""

from __future__ import annotations

from collections.abc import Sequence

MIN_REPEATS = 2
MIN_COVERED = 8
MAX_PERIOD = 512


def period_of(past: Sequence[object]) -> int | None:
    """Return the length of the pattern that repeats at the end of a history of operations; None if there is no pattern.

    The pattern must repeat at least MIN_REPEATS times, and its repetitions must cover at least MIN_COVERED operations
    and at least half of the history. If several lengths fit, return the one whose repetitions cover most operations.
    The operations before the repetitions are ignored: they belong to the start of the job.

    past   the operations, oldest first
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
