"""Facts: what the operating systems of all hosts report about the processes of the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

_OPTIONAL = ("died", "contradicted", "unanswered")  # documents of older versions lack these
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Facts:
    """Observations of the ranks' processes from outside, by rank. A rank without an entry was not observed.

    alive          whether its process runs
    excused        why the process cannot make progress, whatever its witness says ("stopped by a signal")
    lock_holders   the lock that it waits for and the pid of the lock's holder, 0 for none
    cores          processors that the process and its descendants kept busy since the previous observation
    starved        share of that time in which its threads were runnable without a processor, summed over the threads
    died           when its end was first noticed, in seconds on one clock; deaths noticed together have the same time
    contradicted   what another piece of evidence says against its witness
    unanswered     the evidence that it was asked for and did not leave
    """

    alive: Mapping[int, bool] = field(default_factory=dict)
    excused: Mapping[int, str] = field(default_factory=dict)
    lock_holders: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    cores: Mapping[int, float] = field(default_factory=dict)
    starved: Mapping[int, float] = field(default_factory=dict)
    died: Mapping[int, float] = field(default_factory=dict)
    contradicted: Mapping[int, str] = field(default_factory=dict)
    unanswered: Mapping[int, str] = field(default_factory=dict)

    def joined(self, others: Facts, clock_ahead_s: float = 0.0) -> Facts:
        """Add the facts of another host, whose clock is ``clock_ahead_s`` behind this one."""
        joined = {each.name: {**getattr(self, each.name), **getattr(others, each.name)} for each in fields(self)}
        joined["died"].update({rank: when_s + clock_ahead_s for rank, when_s in others.died.items()})
        return Facts(**joined)

    def to_json(self) -> dict[str, Any]:
        """The facts by name, the ranks as strings."""
        return {
            each.name: {str(rank): value for rank, value in getattr(self, each.name).items()} for each in fields(self)
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` wrote; raises KeyError, TypeError or ValueError for anything else."""

        def by_rank(name: str, convert: Callable[[Any], T]) -> dict[int, T]:
            entries = document.get(name, {}) if name in _OPTIONAL else document[name]
            return {int(rank): convert(value) for rank, value in entries.items()}

        return cls(
            by_rank("alive", bool),
            by_rank("excused", str),
            by_rank("lock_holders", _holder),
            by_rank("cores", float),
            by_rank("starved", float),
            by_rank("died", float),
            by_rank("contradicted", str),
            by_rank("unanswered", str),
        )


def _holder(value: Any) -> tuple[str, int]:
    lock, pid = value
    return str(lock), int(pid)
