"""The collectives that a rank has issued, as one numbered sequence of entries, and the schedule that it expects next.

Entry 0 is the first collective after the start vote; step agreements are entries, too. All ranks of a DP group must
issue the same sequence. So ranks can compare, at any time, their entries that have the same number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from repro.attach.vllm.guard.schedule.entry import MASK, Entry, digest_of, joined
from repro.attach.vllm.repeated import Repeated

MAX_SENT = 1024
"""How many of its last entries a rank posts at most: 8 steps of a model with 60 layers, which has 121 in a step."""


class Stream:
    """The collectives ("entries") that one rank has issued, in order.

    The thread that runs the model appends entries; other threads only read.
    """

    def __init__(self) -> None:
        # The number of the first kept entry, and the kept entries. Both are in one tuple, so that other threads always
        # read two that belong together.
        self._kept: tuple[int, list[Entry]] = 0, []
        self._begin = 0  # the number of the first entry after the last agreement
        self._repeated: Repeated[Entry] = Repeated()
        self._kind: Hashable = None
        self._plan: Sequence[Entry] | None = None
        self._expected = self._changes = 0
        self.digest = 0  # digest of the entries since the last agreement
        self.departed = -1  # the number of the last entry that was not the planned one

    @property
    def count(self) -> int:
        """Return how many entries the rank has issued."""
        base, entries = self._kept
        return base + len(entries)

    def departs(self, entry: Entry, ends: bool = False) -> bool:
        """Whether this entry, which is about to be issued, is not the next one of the schedule.

        If the entry is not the next one, the schedule is dropped until the next agreement. Without a schedule, returns
        False.

        ends: whether this entry is the agreement that ends the step; it is expected after the schedule's last entry
        """
        plan = self._plan
        if plan is None:
            return False
        index = self.count - self._begin
        planned = plan[index] if index < len(plan) else None
        if planned is entry or (ends and planned is None):
            return False
        self._plan = None
        self.departed = self.count
        return True

    def append(self, entry: Entry) -> None:
        self._kept[1].append(entry)
        self.digest = joined(self.digest, entry.digest)

    def expected(self) -> int:
        """Return one digest (a number of 64 bits) that stands for all schedules that this rank has learned."""
        if self._changes != self._repeated.changes:
            self._changes, self._expected = self._repeated.changes, 0
            for kind, entries in self._repeated.expected():
                digest = digest_of(repr(kind))
                for entry in entries:
                    digest = joined(digest, entry.digest)
                self._expected = (self._expected + digest) & MASK  # the order of the kinds does not matter
        return self._expected

    def agreed(self, kind: Hashable) -> None:
        """Learn the schedule of the step that has just ended, and begin the next step.

        Call this when the agreement (C1) between the two steps is the last entry.

        kind: the kind of the next step, on which the ranks have just agreed; None if it is unknown
        """
        base, entries = self._kept
        if self._kind is not None:
            self._repeated.learn(self._kind, entries[self._begin - base : -1])
        if len(entries) > 2 * MAX_SENT:
            self._kept = base + len(entries) - MAX_SENT, entries[-MAX_SENT:]
        self._begin, self.digest, self._kind = self.count, 0, kind
        self._plan = self._repeated.of(kind) if kind is not None else None

    def last(self) -> tuple[int, list[Entry]]:
        """Return the last entries, at most MAX_SENT, as a pair: the number of the first of them, and the entries.

        Any thread can call this.
        """
        base, entries = self._kept
        entries = list(entries)
        dropped = max(0, len(entries) - MAX_SENT)
        return base + dropped, entries[dropped:]
