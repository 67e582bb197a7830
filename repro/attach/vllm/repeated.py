"""Learn which sequence follows each kind of event, from sequences that were equal several times in a row.

For the recorder and the guard, an event is a step agreement, its kind is what the ranks agreed on, such as the graph
mode, and the sequence is the collectives of the execution that follows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

NUM_EQUAL = 3
"""How many times in a row a sequence must follow a kind before it is expected."""

T = TypeVar("T", bound=Hashable)


class Repeated(Generic[T]):
    """The expected sequence for each kind of event.

    A sequence is expected as soon as it has followed its kind NUM_EQUAL times in a row. If another sequence follows
    later, nothing is expected after this kind any more.

    changes  how many times the result of `expected` has changed
    """

    def __init__(self) -> None:
        self.changes = 0
        self._learned: dict[Hashable, tuple[tuple[T, ...], int]] = {}
        self._varying: set[Hashable] = set()

    def of(self, kind: Hashable) -> tuple[T, ...] | None:
        """Return the sequence that is expected after this kind of event; None if no sequence is expected."""
        entries, count = self._learned.get(kind, ((), 0))
        return entries if count >= NUM_EQUAL else None

    def learn(self, kind: Hashable, sequence: Sequence[T]) -> None:
        """Note that this sequence followed an event of this kind."""
        if kind in self._varying:
            return
        entries, count = self._learned.get(kind, (None, 0))
        if entries is not None and len(entries) == len(sequence) and entries == tuple(sequence):
            self._learned[kind] = entries, count + 1
            self.changes += count + 1 == NUM_EQUAL
        elif count < NUM_EQUAL:
            self._learned[kind] = tuple(sequence), 1
        else:
            self._varying.add(kind)
            del self._learned[kind]
            self.changes += 1

    def expected(self) -> list[tuple[Hashable, tuple[T, ...]]]:
        """Return all expected sequences, as pairs (kind of event, sequence)."""
        return [(kind, entries) for kind, (entries, count) in self._learned.items() if count >= NUM_EQUAL]
