"""Facts: what the operating systems of all hosts report about the processes of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Facts:
    """Observations of the ranks' processes by the operating system. Each field maps rank -> value; no entry: not
    observed.

    alive          whether the rank's process runs
    excused        why the process cannot make progress, whatever its witness says ("stopped by a signal")
    lock_holders   the lock that the rank waits for and the pid of the lock's holder, 0 for none
    cores          processors that the process and its descendants kept busy since the previous observation
    starved        share of that time in which its threads were runnable without a processor, summed over the threads
    died           when the end of the process was first noticed, in seconds on one clock; equal for deaths noticed
                   together
    contradicted   what another piece of evidence says against the rank's witness
    unanswered     the evidence (stack, dump) that the rank was asked for and did not leave
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
