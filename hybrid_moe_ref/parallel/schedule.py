"""Schedules in words and as a hash, and where two of them differ. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hybrid_moe_ref.parallel.observer import ScheduleEntry


def entry_words(entry: ScheduleEntry) -> str:
    """An entry as people read it: "ep all_gather_v of layers.0.moe"."""
    return f"{entry.group} {entry.op}" + (f" of {entry.layer}" if entry.layer else "")


def schedule_words(schedule: Sequence[ScheduleEntry]) -> list[str]:
    """Each entry as people read it."""
    return [entry_words(entry) for entry in schedule]


def schedule_hash(schedule: Sequence[ScheduleEntry]) -> int:
    """64 bits that are equal on two ranks, with near certainty, only when their schedules are."""
    text = "\n".join(schedule_words(schedule))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def first_difference(schedules: Sequence[Sequence[str]]) -> tuple[int, dict[str, list[int]]]:
    """Index of the first entry that differs, and which ranks have what there; entries are in words."""
    length = max(map(len, schedules))
    for index in range(length):
        sides: dict[str, list[int]] = {}
        for rank, schedule in enumerate(schedules):
            sides.setdefault(schedule[index] if index < len(schedule) else "nothing", []).append(rank)
        if len(sides) > 1:
            return index, sides
    return length, {}
