"""Split a step into two halves, which run one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe_ref.batch import Batch


@dataclass(frozen=True)
class Half:
    """Rows `start` to `stop` - 1 of a step."""

    start: int
    stop: int


def halves(num_rows: int) -> tuple[Half, Half]:
    """Split a step in two. If the number of rows is odd, the first half has one row more. A half can be empty."""
    middle = (num_rows + 1) // 2
    return Half(0, middle), Half(middle, num_rows)


def part_of(batch: Batch, half: Half) -> Batch:
    """Return the batch with the rows of one half of the step.

    Build the second half after the first has run, because a sequence in both halves continues where it ended in the
    first half.
    """
    sequences = batch.sequences
    if not sequences:
        return Batch.dummy(half.stop - half.start, batch.last_rows.device)
    first_rows = [int(row) for group in batch.groups if group.sequences for row in group.rows_BT[:, 0]]
    parts = []
    for first, (sequence, count) in sorted(zip(first_rows, sequences, strict=True), key=lambda item: item[0]):
        held = min(first + count, half.stop) - max(first, half.start)
        if held > 0:
            parts.append((sequence, held))
    return Batch.of(parts, batch.last_rows.device)
