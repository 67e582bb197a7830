"""What repeats: the sequences that followed each kind of event, once they were equal several times in a row."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

NUM_EQUAL = 3
"""How often a sequence must be equal before it is expected."""

T = TypeVar("T", bound=Hashable)


class Repeated(Generic[T]):
    """The sequences by kind. A kind that departs from what was expected is not expected again.

    changes  how often what is expected has changed
    """

    def __init__(self) -> None:
        self.changes = 0
        self._learned: dict[Hashable, tuple[tuple[T, ...], int]] = {}
        self._varying: set[Hashable] = set()

    def of(self, kind: Hashable) -> tuple[T, ...] | None:
        """The sequence that follows this kind; None if that is unknown."""
        entries, count = self._learned.get(kind, ((), 0))
        return entries if count >= NUM_EQUAL else None

    def learn(self, kind: Hashable, sequence: Sequence[T]) -> None:
        """Note that this sequence followed."""
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
        """Every kind that has an expected sequence, with the sequence."""
        return [(kind, entries) for kind, (entries, count) in self._learned.items() if count >= NUM_EQUAL]
