"""A look at a run: everything that a watcher knows about the run at one moment.

The judge gives the same verdict on the same look on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from repro.hosts.collect import PATIENCE_S, name_missing
from repro.hosts.options import WatchOptions
from repro.store.run_dir import RunDir
from repro.trace.witness.file import Witness
from repro.trace.witness.format import Identity
from repro.verdict import Verdict, judge
from repro.verdict.facts import Facts
from repro.watch.flight_recorder import compare_dumps


@dataclass(frozen=True)
class Look:
    """A look at a run: everything that a watcher knows about the run at one moment.

    watcher     the process that took the look; now_ns and ``facts.died`` are times on the clock of this process's host
    now_ns      the monotonic clock just before the files were read, so the time of reading does not count as quiet time
    witnesses   rank -> witness; ranks whose witness could not be read are absent
    facts       what the operating systems of the hosts said about the ranks' processes
    notes       further observations of the watcher, in sentences. Only verdict.json keeps them
    """

    watcher: Identity
    now_ns: int
    witnesses: Mapping[int, Witness] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    notes: tuple[str, ...] = ()

    def verdict(self, options: WatchOptions, wrong_numbers: Sequence[str] = ()) -> Verdict:
        """Call the judge for the witnesses and facts of this look.

        wrong_numbers: a line for each result that differs from the reference.
        """
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

    def concluded(self, run_dir: RunDir, options: WatchOptions, wrong_numbers: Sequence[str] = ()) -> Verdict:
        """Judge this look. Add the notes, and what the Flight Recorder dumps say, to the evidence of the verdict.

        If no rank has begun, the verdict is `inconclusive` without culprits.
        """
        verdict = self.verdict(options, wrong_numbers)
        if self.none_began():
            verdict = Verdict("inconclusive", ranks=verdict.ranks, confidence="undecided", quiet_s=verdict.quiet_s)
            verdict = verdict.with_evidence(["no rank has begun: look at the launcher's log for the reason"])
        confirmed = compare_dumps(run_dir, verdict.ranks).sentences()
        contradicted = [f"rank {rank}: {text}" for rank, text in self.facts.contradicted.items()]
        missing = name_missing(self.facts.unanswered, PATIENCE_S)
        return verdict.with_evidence([*confirmed, *contradicted, *missing, *self.notes])

    def none_began(self) -> bool:
        """Whether no rank has begun to record: there are witness files, but no rank has opened its file.

        Return False if there are no witness files, or if the process of a rank is known to have ended.
        """
        writers = [witness.writer for witness in self.witnesses.values()]
        return bool(writers) and not any(writer.pid for writer in writers) and False not in self.facts.alive.values()
