"""Learn which collectives follow each kind of step agreement, from several equal steps of this kind.

The kind of a step agreement is what the ranks agreed on, such as the graph mode.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

NUM_EQUAL = 3
"""A sequence is expected of a kind of step if the last NUM_EQUAL steps of this kind had it."""

T = TypeVar("T", bound=Hashable)


class Repeated(Generic[T]):
    """The collectives that are expected in a step, for each kind of step.

    The kind is what the ranks agreed on at the begin of the step, such as the graph mode. A sequence of collectives is
    expected as soon as the last NUM_EQUAL steps of a kind had it; steps of other kinds can lie between them. If a later
    step of this kind has another sequence, nothing is expected of this kind any more.

    changes  how many times the result of `expected` has changed
    """

    def __init__(self) -> None:
        self.changes = 0
        self._learned: dict[Hashable, tuple[tuple[T, ...], int]] = {}
        self._varying: set[Hashable] = set()

    def of(self, kind: Hashable) -> tuple[T, ...] | None:
        """Return the collectives that are expected of a step of this kind, in order.

        None if the steps of this kind so far were too few, or differed.
        """
        entries, count = self._learned.get(kind, ((), 0))
        return entries if count >= NUM_EQUAL else None

    def learn(self, kind: Hashable, sequence: Sequence[T]) -> None:
        """Note that a step of this kind had this sequence of collectives."""
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
        """Return all expected sequences, as pairs (kind of step, sequence)."""
        return [(kind, entries) for kind, (entries, count) in self._learned.items() if count >= NUM_EQUAL]
