"""Everything that a watcher knows of a run at one moment. The verdict follows from it, wherever it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repro.hosts.options import WatchOptions
from repro.trace.format import Identity
from repro.trace.witness import Witness
from repro.verdict import Verdict, judge
from repro.verdict.facts import Facts


@dataclass(frozen=True)
class Look:
    """One moment of a run.

    watcher     who looked: on the clock of its host are now_ns and the deaths among the facts
    now_ns      its monotonic clock before it read anything, so that what happens during the look is no silence
    witnesses   rank -> witness, without those that could not be read
    notes       what else the watcher saw, in sentences
    """

    watcher: Identity
    now_ns: int
    witnesses: Mapping[int, Witness] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    notes: tuple[str, ...] = ()

    def verdict(self, options: WatchOptions, wrong_numbers: Sequence[str] = ()) -> Verdict:
        """What this look proves."""
        return judge(
            self.witnesses,
            self.facts,
            num_ranks=options.num_ranks,
            now_ns=self.now_ns,
            quiet_window_s=options.quiet_window_s,
            home=self.watcher,
            wrong_numbers=wrong_numbers,
            queued=options.queued_groups,
        )

    def none_began(self) -> bool:
        """Whether no rank has opened its witness, and none is known to have ended."""
        writers = [witness.writer for witness in self.witnesses.values()]
        return bool(writers) and not any(writer.pid for writer in writers) and False not in self.facts.alive.values()

    def unless_begun(self, verdict: Verdict) -> Verdict:
        """The verdict; if no rank has begun, an undecided one that names no rank for that."""
        if not self.none_began():
            return verdict
        undecided = Verdict("inconclusive", ranks=verdict.ranks, confidence="undecided", quiet_s=verdict.quiet_s)
        return undecided.with_evidence(["no rank has begun: the launcher's log may say why"])

    def to_json(self) -> dict[str, Any]:
        """All but the witnesses, which are files of the run, and the notes, which the verdict has as evidence."""
        return {
            "watcher": {
                "hostname": self.watcher.hostname,
                "boot_id": self.watcher.boot_id,
                "pid_namespace": self.watcher.pid_namespace,
                "wall_offset_ns": self.watcher.wall_offset_ns,
                "now_ns": self.now_ns,
            },
            "system": self.facts.to_json(),
        }


def watcher_from_json(entry: Mapping[str, Any]) -> tuple[Identity, int]:
    """The watcher and its clock as ``Look.to_json`` writes them; raises KeyError, TypeError or ValueError otherwise."""
    identity = Identity(
        0,
        1,
        hostname=str(entry["hostname"]),
        boot_id=str(entry["boot_id"]),
        pid_namespace=int(entry["pid_namespace"]),
        wall_offset_ns=int(entry["wall_offset_ns"]),
    )
    return identity, int(entry["now_ns"])
