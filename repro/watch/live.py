"""The watcher: follow the witnesses of a run from outside the ranks, and decide when and how the run has ended.

The watcher only reads files that the ranks write. If no rank has recorded an event for the quiet window, the watcher
calls the judge. If the verdict is `slow` (a rank still works) or `inconclusive`, the watcher continues. Before a final
verdict, the watcher collects stacks and Flight Recorder dumps. The watcher ends no process: after it has written
verdict.json, its caller can end the ranks. If the watcher fails, the verdict is `inconclusive` (see logs/watcher.log).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from hybrid_moe_ref.files import room_for
from repro.hosts import collect
from repro.hosts.agent import RemoteHosts
from repro.hosts.host import READ_FAILURES, Host
from repro.hosts.options import WatchOptions
from repro.hosts.processes import Process
from repro.hosts.system import System
from repro.store.run_dir import RunDir, write_json
from repro.store.schema import to_json
from repro.trace.witness.file import Tail, Witness
from repro.trace.witness.tails import Tails
from repro.verdict import Verdict
from repro.verdict.classes import class_of
from repro.verdict.facts import Facts
from repro.watch.comparison import Comparison
from repro.watch.document import Document, Durations, Watcher, describe, progress_of
from repro.watch.failure import failed
from repro.watch.flight_recorder import compare_dumps
from repro.watch.look import Look
from repro.watch.notices import Notices
from repro.watch.qualified import ended_from_outside, not_decided, uncompared
from repro.watch.silences import Silences

POLL_S = 0.05

ANSWER_PATIENCE_S = 2.0
"""How many seconds the watcher waits for the agents of other hosts to collect stacks and dumps from their ranks."""

DEATH_GRACE_S = 0.5
DEATH_PATIENCE_S = 5.0
"""How long the watcher waits after a rank died, before it gives the verdict: until no rank has recorded an event for
DEATH_GRACE_S, and at most DEATH_PATIENCE_S.

In this time the other ranks may finish their work, or record that they lost the dead rank.
"""

READ_PATIENCE_S = 5.0
"""For how many seconds every read of the witnesses may fail before the watcher gives up.

Some failures pass by themselves: a stale NFS file handle, or a lack of file descriptors.
"""


@dataclass
class Watch:
    """Watches one run until there is a verdict. The caller passes in, as functions, what depends on the kind of job.

    run_dir       the directory with the witnesses of the run
    options       the settings of the watch, such as the quiet window
    job_alive     returns whether the job still runs; if not, the watch ends after a short wait
    compare       compares the results with the reference when all ranks are done. If the results are not ready, it
                  returns None, and the watcher calls it again later. The argument is True at the last call, which must
                  return a Comparison
    describe      makes the content of verdict.json from a verdict, with the settings of the run
    read          gets the witnesses (rank -> witness) and returns the witnesses to judge, for example with other names
                  of layers; by default returns them unchanged
    interrupted   returns whether the user has asked for the end of the run
    show          displays the progress; called at every poll with the open witnesses
    notice        prints a line of text, for example the waits between ranks when they have changed
    remark        returns a line to print about a verdict that is not final, or "". Equal lines are printed only once
    host          observes the processes and locks of this host
    """

    run_dir: RunDir
    options: WatchOptions
    job_alive: Callable[[], bool]
    compare: Callable[[bool], Comparison | None] = lambda final: Comparison()
    describe: Callable[[Verdict], Document] = describe
    read: Callable[[dict[int, Witness]], dict[int, Witness]] = lambda witnesses: witnesses
    interrupted: Callable[[], bool] = lambda: False
    show: Callable[[list[Tail]], None] = lambda tails: None
    notice: Callable[[str], None] = lambda text: None
    remark: Callable[[Verdict], str] = lambda verdict: ""
    host: Host = field(default_factory=Host)

    def __post_init__(self) -> None:
        self.started_ns = self.host.now_ns()
        self._tails = Tails(self.run_dir, self.options.num_ranks, self.host.here)
        self._system = System(self.options.quiet_window_s, self.host)
        self._remote_hosts = RemoteHosts(self.run_dir, self.host)
        self._look = Look(self.host.here, self.started_ns)
        self._judged_ns = 0
        self._died_ns = 0
        self._failing_since_ns = 0
        self._measuring = False
        self._interrupted = False
        self._ended_by = ""
        self._notices = Notices(self.notice, self.remark, self.options.quiet_window_s)
        self._reasons: list[str] = []  # why the watch ends
        self._silences = Silences()

    def run(self) -> Document:
        """Watch until there is a final verdict, then write verdict.json. Return the content of verdict.json.

        Disk space for verdict.json is reserved at the start, because the disk may be full at the end. Raises OSError if
        verdict.json cannot be written.
        """
        with room_for(self.run_dir.verdict, _verdict_bytes(self.options.num_ranks)):
            try:
                while (verdict := self._poll()) is None:
                    self.show(self._tails.opened())
                    self._pause()
            except Exception as error:
                verdict = self._failed(error)
            return self._write(verdict)

    def processes(self) -> list[Process]:
        """Return the processes of the ranks that run on this host, also of a rank whose witness file was deleted."""
        return [process for process in self._running().values() if process is not None]

    def remote_ranks_run(self) -> bool:
        """Whether a rank runs on another host, according to the agents of the other hosts."""
        return self._remote_hosts.any_running()

    def all_done(self) -> bool:
        """Whether every rank has finished all its work."""
        return self._tails.all_done()

    def _poll(self) -> Verdict | None:
        """Read the witnesses. Return the final verdict, or None if the watch must continue.

        If a file cannot be read, return None, because the next poll may succeed. Raise the error if reading has failed
        for more than READ_PATIENCE_S seconds.
        """
        try:
            self._tails.open()
            verdict = self._decide()
        except READ_FAILURES as error:
            now_ns = self.host.now_ns()
            self._failing_since_ns = self._failing_since_ns or now_ns
            if now_ns - self._failing_since_ns > READ_PATIENCE_S * 1e9:
                raise error
            return None
        self._failing_since_ns = 0
        return verdict

    def _pause(self) -> None:
        """Sleep until the next poll, and note how late the sleep ends. A late end shows that no processor was free."""
        asleep_ns = self.host.now_ns()
        self.host.sleep(POLL_S)
        self._system.note_late((self.host.now_ns() - asleep_ns) / 1e9 - POLL_S)

    def _decide(self) -> Verdict | None:
        now_ns = self.host.now_ns()
        if self.interrupted():
            self._interrupted = True
            return not_decided(self._conclude())
        if now_ns - self.started_ns > self.options.deadline_s * 1e9:
            return self._conclude(f"the deadline of {self.options.deadline_s:g} s passed")
        if self.all_done():
            return self._compared(final=False)
        if self._death_is_settled(now_ns):
            verdict, self._ended_by = self._conclude(), collect.launcher_was_ended(self.run_dir)
            return ended_from_outside(verdict, self._ended_by) if self._ended_by else verdict
        if self._died_ns:  # wait, even after a long time without events: the other ranks may soon record one
            return None
        quiet_ns = self.options.quiet_window_s * 1e9
        waited_ns = now_ns - max(self._last_event_ns(), self._judged_ns)
        if waited_ns < quiet_ns:
            if self._last_event_ns() < self._judged_ns:
                self._silences.go_on((now_ns - self._last_event_ns()) / 1e9)
            if waited_ns < quiet_ns / 2:
                self._measuring = False
            elif not self._measuring:  # processor use is measured in the second half of the quiet window
                self._measuring = True
                self._system.begin_measuring(self._pids())
            self._report_builds(now_ns)
            return None
        return self._decide_in_quiet()

    def _report_builds(self, now_ns: int) -> None:
        """Print which ranks wait for a rank that builds a kernel, even if ranks record events (see notices.py)."""
        if self._notices.is_build_check_due(now_ns, self._tails.waiting_since_ns()):
            verdict = self._judge()
            self._notices.builds(verdict, now_ns, self.host.now_ns())

    def _decide_in_quiet(self) -> Verdict | None:
        """Judge after a quiet window. Return the verdict; None if the watch must continue.

        The watch continues if the verdict is not final (`slow` or `inconclusive`), or if a rank recorded an event while
        stacks and dumps were collected.
        """
        last_event_ns, self._judged_ns = self._last_event_ns(), self.host.now_ns()
        self._system.measure(self._pids())
        verdict = self._judge()
        if not class_of(verdict.verdict).final:
            self._notices.silence(verdict)
            self._silences.remember(
                verdict,
                self._look.facts,
                (self.host.now_ns() - self._tails.heartbeat_ns()) / 1e9,
                self.options.quiet_window_s,
            )
            return None
        verdict = self._judge_with_evidence()
        # A rank may have moved while the evidence was collected, or the evidence may contradict the verdict.
        moved = self._last_event_ns() != last_event_ns
        return verdict if class_of(verdict.verdict).final and not moved else None

    def _conclude(self, why: str = "") -> Verdict:
        """Return the final verdict from the evidence at hand, because the watch must end now.

        why: the reason, which becomes a line of the verdict's evidence; "" for none
        """
        self._reasons = [why] if why else []
        if self.all_done() and (verdict := self._compared(final=True)) is not None:
            return verdict
        self._system.measure(self._pids())
        return self._judge_with_evidence()

    def _judge_with_evidence(self) -> Verdict:
        """Let the ranks write stacks and dumps, read the witnesses again, and judge witnesses and dumps together.

        Processor use is not measured again, because the ranks also use a processor to write stacks and dumps.
        """
        unanswered = self._collect_evidence()
        check = compare_dumps(self.run_dir, self._judge().ranks)
        further = Facts(unanswered=unanswered, contradicted=check.contradicted)
        self._look = dataclasses.replace(self._look, facts=self._look.facts.joined(further))
        return self._look.concluded(self.run_dir, self.options)

    def _judge(self, wrong_numbers: Sequence[str] = ()) -> Verdict:
        self._look = self._take_look()
        return self._look.verdict(self.options, wrong_numbers).with_evidence(self._look.notes)

    def _take_look(self) -> Look:
        """Return all that the watcher can observe now. Read the clock first, then the processes, then the witnesses."""
        now_ns = self.host.now_ns()
        self._tails.open()
        running = self._running()
        witnesses, refused = self._tails.read()
        notes = [*self._remote_hosts.silent(), *refused]
        witnesses = self.read(witnesses)
        facts = self._remote_hosts.merged(self._system.look(witnesses, running))
        never = [rank for rank, witness in witnesses.items() if not witness.writer.pid]
        if never and not self.job_alive():  # the launcher has ended, so these ranks can never start
            facts = facts.joined(Facts(alive=dict.fromkeys(never, False)))
            notes.append(collect.of_launcher(self.run_dir, never))
        notes += [*self._describe_strangers(witnesses, facts), *self._reasons]
        return Look(self.host.here, now_ns, witnesses, facts, tuple(notes))

    def _describe_strangers(self, witnesses: Mapping[int, Witness], facts: Facts) -> list[str]:
        """Return a line for each process of this host that is not a rank, and holds a lock for which a rank waits."""
        here = [rank for rank, witness in witnesses.items() if self._system.is_here(witness.writer)]
        holders = {pid for rank, (_, pid) in facts.lock_holders.items() if rank in here and pid > 0}
        return [self.host.describe(pid) for pid in sorted(holders - {witnesses[rank].writer.pid for rank in here})]

    def _compared(self, final: bool) -> Verdict | None:
        """Compare the results of a run whose ranks are all done. Return the verdict; None if it is too early for this.

        A `clean` verdict becomes `slow` if ranks had waited long while no rank recorded an event, and `inconclusive` if
        the results cannot be compared. final: whether this is the last call, which does not return None
        """
        comparison = self.compare(final)
        if comparison is None:
            return None
        if comparison.missing:
            return uncompared(self._judge(), comparison.missing)
        verdict = self._judge(wrong_numbers=comparison.wrong)
        if verdict.verdict != "clean":
            return verdict
        compared = [comparison.evidence] if comparison.evidence else []
        slowest = self._silences.slowest(self.options.quiet_window_s)
        if slowest is None:
            return verdict.with_evidence(compared)
        return slowest.with_evidence(["then all ranks finished", *compared])

    def _last_event_ns(self) -> int:
        return max(self.started_ns, self._tails.last_event_ns())

    def _running(self) -> dict[int, Process | None]:
        return self._system.running(self._tails.writers())

    def _pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self._running().items() if process is not None}

    def _death_is_settled(self, now_ns: int) -> bool:
        """Whether a rank died or failed, or all processes ended, and the other ranks have had time to react.

        They have had time if no event came for DEATH_GRACE_S seconds, or if DEATH_PATIENCE_S seconds have passed since
        the watcher noticed the end. In this time they can finish, or record that they lost the rank.
        """
        ended = {rank for rank, process in self._running().items() if process is None}
        # a rank of a user's program ends by itself when it is done: this is not a death
        died = bool(ended) and not ended <= self._tails.done()
        gone = died or not self.job_alive() or self._remote_hosts.any_ended()
        if not gone and not self._tails.any_failed():
            self._died_ns = 0
            return False
        self._died_ns = self._died_ns or now_ns
        quiet_ns = now_ns - max(self._died_ns, self._last_event_ns())
        return quiet_ns > DEATH_GRACE_S * 1e9 or now_ns - self._died_ns > DEATH_PATIENCE_S * 1e9

    def _collect_evidence(self) -> dict[int, str]:
        """Let all ranks write their stacks and dumps. Return, for each rank, the evidence that it did not write."""
        request = self._remote_hosts.request_evidence()
        unanswered = self.host.collect(self.run_dir, self._pids())
        return unanswered | self._remote_hosts.answers(request, ANSWER_PATIENCE_S)

    def _failed(self, error: Exception) -> Verdict:
        """Return the verdict after a failure of the watcher itself: `inconclusive`, with the evidence at hand."""
        errors = [error]
        # take a last look while the ranks still exist: verdict.json has it, for a later judgement
        try:
            gaps = collect.name_missing(self._collect_evidence(), collect.PATIENCE_S)
            self._look = self._take_look()
        except Exception as second:
            errors.append(second)
            gaps = ["not all evidence could be collected"]
        return failed(self.run_dir, "the watcher", errors, gaps)

    def _write(self, verdict: Verdict) -> Document:
        now_ns = last_event_ns = self.host.now_ns()
        with contextlib.suppress(*READ_FAILURES):
            last_event_ns = self._last_event_ns()
        document = msgspec.structs.replace(
            self.describe(verdict),
            watcher=Watcher.of(self._look),
            system=self._look.facts,
            notes=self._look.notes,
            judged=progress_of(self._look),
            interrupted=self._interrupted,
            ended_by=self._ended_by,
            seconds=Durations(
                round(max(0, now_ns - last_event_ns) / 1e9, 3), round((now_ns - self.started_ns) / 1e9, 3)
            ),
        )
        try:
            write_json(self.run_dir.verdict, to_json(document), durable=True)
        except OSError as error:
            self.notice(f"{verdict.verdict}: {verdict.sentence()}; verdict.json could not be written: {error.strerror}")
            raise
        return document


def _verdict_bytes(num_ranks: int) -> int:
    """Return an upper limit of the size of a verdict.json in bytes.

    The position of a rank can list one size for each member of a group, so the limit grows with num_ranks squared.
    """
    return (64 << 10) + num_ranks * (4096 + 16 * num_ranks)
