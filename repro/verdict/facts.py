"""Facts: what the operating systems of the hosts say about the processes of the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True)
class Facts:
    """What was observed about the ranks' processes. Each field is a dict from rank to value.

    A rank without a value in ``alive``, ``cores`` or ``starved`` was not observed or not measured. Each other field has
    only the ranks for which there is something to report.

    alive          whether the process exists
    excused        why the process cannot make progress, whatever the rank's witness shows: "stopped by a signal"
    lock_holders   (the lock for which the rank waits, pid of the process that holds the lock; 0 if no process holds it)
    cores          how many processors the process and its descendants kept busy since the previous observation
    starved        for which share of this time the process lacked a processor: the largest of the share in which its
                   threads could run but got no processor (summed over the threads), the share that the hypervisor took
                   from the host, and the share by which the watcher's own sleeps were too long
    died           when the watcher (or agent) first noticed that the process had ended, in seconds on one clock for
                   all ranks. Processes whose ends were noticed together have the same time
    contradicted   evidence that contradicts the rank's witness, as text
    unanswered     the evidence (stack, Flight Recorder dump) that the watcher requested and the rank did not write
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
        """Return these facts together with ``others``, the facts of another host.

        clock_ahead_s   how many seconds the clock of ``self.died`` is ahead of the clock of ``others.died``
        """
        joined = {each.name: {**getattr(self, each.name), **getattr(others, each.name)} for each in fields(self)}
        joined["died"].update({rank: when_s + clock_ahead_s for rank, when_s in others.died.items()})
        return Facts(**joined)
