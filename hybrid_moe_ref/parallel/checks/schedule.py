"""Format, hash and compare schedules. Does not import torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hybrid_moe_ref.parallel.observer import ScheduleEntry


def entry_words(entry: ScheduleEntry) -> str:
    """Format an entry: "ep all_gather_v of layers.0.moe"."""
    return f"{entry.group} {entry.op}" + (f" of {entry.layer}" if entry.layer else "")


def schedule_words(schedule: Sequence[ScheduleEntry]) -> list[str]:
    """Format each entry as text."""
    return [entry_words(entry) for entry in schedule]


def schedule_hash(schedule: Sequence[ScheduleEntry]) -> int:
    """Return a 64-bit hash of the schedule."""
    text = "\n".join(schedule_words(schedule))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def first_difference(schedules: Sequence[Sequence[str]]) -> tuple[int, dict[str, list[int]]]:
    """Find the first entry that differs between ranks. Returns its index, and a dict: entry -> the ranks that have it.

    A rank whose schedule ends before this index has the entry "nothing". If no entry differs, the dict is empty.

    schedules: for each rank, from rank 0, its entries as text
    """
    length = max(map(len, schedules))
    for index in range(length):
        sides: dict[str, list[int]] = {}
        for rank, schedule in enumerate(schedules):
            sides.setdefault(schedule[index] if index < len(schedule) else "nothing", []).append(rank)
        if len(sides) > 1:
            return index, sides
    return length, {}
