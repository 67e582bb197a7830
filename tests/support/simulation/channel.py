"""The collectives of one simulated group: which ranks have come to which, and which of them a backend can complete."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective

GroupKey = tuple[str, tuple[int, ...]]


@dataclass
class Channel:
    """The queue of one group's collectives ("meetings").

    Meeting k completes after meeting k - 1, when all members have come.
    """

    members: tuple[int, ...]
    calls: list[dict[int, tuple[Collective, int]]] = field(default_factory=list)  # meeting -> rank -> call, step
    issued: dict[int, int] = field(default_factory=dict)
    left: list[set[int]] = field(default_factory=list)
    completed: int = 0
    jammed: str = ""  # why no further meeting will complete
    # the members for which the last meeting completed, although it completed for no others
    served: set[int] = field(default_factory=set)

    def join(self, rank: int, call: Collective, step: int) -> int:
        """Let a rank issue its next call in this group. Returns the number of the meeting that it joins, from 1."""
        seq = self.issued[rank] = self.issued.get(rank, 0) + 1
        while len(self.calls) < seq:
            self.calls.append({})
            self.left.append(set())
        self.calls[seq - 1][rank] = (call, step)
        return seq

    def next_meeting(self) -> dict[int, tuple[Collective, int]] | None:
        """Return the next meeting to complete, if all members have come to it; else None."""
        if self.jammed or self.completed == len(self.calls):
            return None
        meeting = self.calls[self.completed]
        return meeting if len(meeting) == len(self.members) else None

    def differs(self) -> bool:
        """Whether a backend cannot complete the next meeting, because the calls of its members differ."""
        return len({_shape_of(call) for call, _ in self.calls[self.completed].values()}) > 1

    def largest_side(self) -> set[int]:
        """Return the members of the next meeting that agree with most others."""
        shapes = {rank: _shape_of(call) for rank, (call, _) in self.calls[self.completed].items()}
        most = Counter(shapes.values()).most_common(1)[0][0]
        return {rank for rank, shape in shapes.items() if shape == most}


def _shape_of(call: Collective) -> Any:
    """Return the fields that must be equal for a backend to complete a call. It does not notice dtype and reduce op."""
    return ("transfer", call.sizes) if call.op in ("send", "recv") else (call.op, call.root, call.sizes)
