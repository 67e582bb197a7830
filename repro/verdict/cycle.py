"""Find a cycle in a graph of waits."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


def find_cycle(waits_for: Mapping[T, Iterable[T]]) -> list[T]:
    """Return the nodes of one cycle, in which each node waits for the next node and the last for the first; or [].

    waits_for   node -> the nodes for which this node waits
    """
    try:
        TopologicalSorter(waits_for).prepare()
    except CycleError as error:
        # In graphlib's list each member is awaited by the next, so it is reversed. Its first member is also its last.
        cycle: list[T] = error.args[1]
        return cycle[:0:-1]
    return []
