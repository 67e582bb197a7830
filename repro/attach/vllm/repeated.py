"""Learn which sequence follows each kind of event, from sequences that were equal several times in a row.

The recorder and the guard learn so which collectives a kind of model execution issues.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

NUM_EQUAL = 3
"""How many times in a row a sequence must follow a kind before it is expected."""

T = TypeVar("T", bound=Hashable)


class Repeated(Generic[T]):
    """The sequence that is expected after each kind. If another sequence follows once, that kind is never expected
    again.

    changes  how often `expected` has changed
    """

    def __init__(self) -> None:
        self.changes = 0
        self._learned: dict[Hashable, tuple[tuple[T, ...], int]] = {}
        self._varying: set[Hashable] = set()

    def of(self, kind: Hashable) -> tuple[T, ...] | None:
        """Return the sequence that is expected after this kind; None if none is."""
        entries, count = self._learned.get(kind, ((), 0))
        return entries if count >= NUM_EQUAL else None

    def learn(self, kind: Hashable, sequence: Sequence[T]) -> None:
        """Note that this sequence followed the kind."""
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
        """Return (kind, sequence that is expected after it) for each kind of event for which one is expected."""
        return [(kind, entries) for kind, (entries, count) in self._learned.items() if count >= NUM_EQUAL]
