"""Find a cycle in a graph of waits."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def find_cycle(waits_for: Mapping[T, Iterable[T]]) -> list[T]:
    """Find a cycle in which each member waits for the next, and the last for the first; [] if there is none.

    waits_for   member -> the members for which it waits
    """
    try:
        TopologicalSorter(waits_for).prepare()
    except CycleError as error:
        # In graphlib's list each member is awaited by the next, so it is reversed. Its first member is also its last.
        cycle: list[T] = error.args[1]
        return cycle[:0:-1]
    return []
