"""Find a cycle of waits."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def find_cycle(waits_for: Mapping[T, Iterable[T]]) -> list[T]:
    """Find a cycle in which each member waits for the next one; [] if there is none. Linear in the waits."""
    try:
        TopologicalSorter(waits_for).prepare()
    except CycleError as error:
        # graphlib lists a cycle from the awaited member back to the waiting one.
        cycle: list[T] = error.args[1]
        return cycle[:0:-1]
    return []
