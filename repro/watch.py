"""The watcher: outside the ranks, it follows their witnesses and decides when and how a run has ended.

It only reads what the ranks leave. When nothing has happened on any rank for the quiet window, it asks the
verdict engine; while the answer is that somebody still works it goes on watching. Before it says anything final
it collects stacks and Flight Recorder dumps, and writes verdict.json before anything is ended.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from repro import evidence, process
from repro.layout import Kind
from repro.lookout import Others
from repro.options import WatchOptions
from repro.parse import WitnessError
from repro.record import myself
from repro.rundir import RunDir, write_json
from repro.system import STOPPED, System
from repro.verdict import Verdict, judge
from repro.verdict.facts import Facts
from repro.witness import Tail, Witness

SCHEMA_VERSION = 1
POLL_S = 0.05
SLOW_WINDOWS = 3
"""A run that ends well is called slow when ranks waited for the same ones through so many quiet windows on end."""

ANSWER_PATIENCE_S = 2.0
"""How long the other hosts may take to collect evidence from their ranks."""

DEATH_GRACE_S = 0.5
DEATH_PATIENCE_S = 5.0
"""After a death the verdict waits until nothing has happened for the first, at most for the second: the peers may be
about to finish without the dead rank, or to say that they miss it.
"""


@dataclass(frozen=True)
class Comparison:
    """What is known about the results of ranks that are all done.

    wrong     a line for each wrong result
    missing   why the results were not compared; "" if they were
    evidence  what was compared, in a sentence
    """

    wrong: tuple[str, ...] = ()
    missing: str = ""
    evidence: str = ""


def describe(verdict: Verdict) -> dict[str, Any]:
    """The entries of verdict.json that follow from the verdict alone."""
    return {"schema_version": SCHEMA_VERSION, **verdict.to_json(), "sentences": verdict.sentences()}


@dataclass
class Watch:
    """One watch over one run.

    job_alive         whether the processes that were started still exist
    compare           compares the results once all ranks are done. It may return None, to be asked again, unless its
                      argument is True: then the watch ends now
    describe          the entries of verdict.json that do not depend on the watch
    interrupted       whether the user wants the run to end
    show              called at every poll with the tails, for a display
    notice            called with a line when it has changed who waits for whom
    """

    run_dir: RunDir
    options: WatchOptions
    job_alive: Callable[[], bool]
    compare: Callable[[bool], Comparison | None] = lambda final: Comparison()
    describe: Callable[[Verdict], dict[str, Any]] = describe
    interrupted: Callable[[], bool] = lambda: False
    show: Callable[[list[Tail]], None] = lambda tails: None
    notice: Callable[[str], None] = lambda text: None
    started_ns: int = field(default_factory=time.monotonic_ns)

    def __post_init__(self) -> None:
        self._here = myself(0, 1)
        self._tails = [Tail(self.run_dir.witness(rank)) for rank in range(self.options.num_ranks)]
        self._system = System(self.options.quiet_window_s)
        self._others = Others(self.run_dir, self._here)
        self._facts = Facts()
        self._judged_ns = 0
        self._died_ns = 0
        self._measuring = False
        self._noticed: list[str] = []
        self._silences: dict[tuple[int, ...], tuple[float, Verdict]] = {}  # by who was waited for, the longest

    def run(self) -> dict[str, Any]:
        """Watch until the run is decided; returns what was written to verdict.json."""
        try:
            while (verdict := self._decide()) is None:
                self.show(self._tails)
                time.sleep(POLL_S)
        except Exception:
            self._collect_evidence()  # whoever called ends the ranks, and what they could tell with them
            raise
        return self._write(verdict)

    def processes(self) -> list[psutil.Process]:
        """The ranks that run, by what their witnesses said, even if the files are gone by now."""
        return [it for it in self._running().values() if it is not None]

    def others_run(self) -> bool:
        """Whether ranks run on other hosts, as far as their lookouts say."""
        return self._others.someone_runs()

    def all_done(self) -> bool:
        """Whether every rank has finished all its work."""
        return all(_last_kind(tail) == Kind.DONE for tail in self._tails)

    def _decide(self) -> Verdict | None:
        """The final verdict, or None while there is reason to go on."""
        now_ns = time.monotonic_ns()
        if self.interrupted():
            return not_decided(self._conclude())
        if now_ns - self.started_ns > self.options.deadline_s * 1e9:
            return self._conclude(f"the deadline of {self.options.deadline_s:g} s passed")
        if self.all_done():
            return self._compared(final=False)
        if self._somebody_died(now_ns):
            return self._conclude()
        quiet_ns = self.options.quiet_window_s * 1e9
        waited_ns = now_ns - max(self._last_event_ns(), self._judged_ns)
        if waited_ns < quiet_ns:
            if waited_ns < quiet_ns / 2:
                self._measuring = False
            elif not self._measuring:  # what the ranks' processors do in the second half of the silence
                self._measuring = True
                self._system.use({rank: it.pid for rank, it in self._running().items() if it is not None})
            return None
        return self._decide_in_quiet()

    def _decide_in_quiet(self) -> Verdict | None:
        """Judge once per quiet window: a rank that works on without events is `slow`, and the watch goes on."""
        last_event_ns, self._judged_ns = self._last_event_ns(), time.monotonic_ns()
        verdict = self._judge()
        if verdict.verdict in ("slow", "inconclusive"):
            self._notice(verdict)
            self._remember(verdict)
            return None
        gaps = self._collect_evidence()
        if self._last_event_ns() != last_event_ns:
            return None  # somebody moved while the evidence was taken: it was not a hang
        verdict = self._judge()
        if verdict.verdict in ("slow", "inconclusive"):
            return None  # the machine turned out too busy while the evidence was taken
        return self._with_dumps(verdict, gaps)

    def _conclude(self, why: str = "") -> Verdict:
        """The last word, with what there is: nothing more will be seen of this run."""
        reasons = [why] if why else []
        if self.all_done() and (verdict := self._compared(final=True)) is not None:
            return with_evidence(verdict, reasons)
        gaps = self._collect_evidence()
        return self._with_dumps(self._judge(), [*reasons, *gaps])

    def _judge(self, wrong_numbers: Sequence[str] = ()) -> Verdict:
        witnesses: dict[int, Witness] = {}
        unreadable = []
        for rank, tail in enumerate(self._tails):
            try:
                witnesses[rank] = tail.witness()
            except WitnessError as error:
                unreadable.append(str(error))
        self._facts = self._others.merged(self._system.look(witnesses))
        told = self._others.silent()
        never = [rank for rank, witness in witnesses.items() if not witness.who.pid]
        if never and not self.job_alive():  # nobody is left who could start them
            self._facts = self._facts.joined(Facts(alive=dict.fromkeys(never, False)))
            told.append(evidence.of_launcher(self.run_dir, never))
        verdict = judge(
            witnesses,
            self._facts,
            num_ranks=self.options.num_ranks,
            now_ns=time.monotonic_ns(),
            quiet_window_s=self.options.quiet_window_s,
            home=self._here,
            wrong_numbers=wrong_numbers,
            queued=self.options.queued_groups,
        )
        here = [rank for rank, witness in witnesses.items() if self._system.is_here(witness.who)]
        holders = {pid for rank, (_, pid) in self._facts.lock_holders.items() if rank in here and pid > 0}
        told += [process.describe(pid) for pid in sorted(holders - {witnesses[rank].who.pid for rank in here})]
        return with_evidence(verdict, [*told, *unreadable])

    def _with_dumps(self, verdict: Verdict, texts: list[str]) -> Verdict:
        return with_evidence(verdict, [*evidence.compare_with_flight_recorder(self.run_dir, verdict.ranks), *texts])

    def _compared(self, final: bool) -> Verdict | None:
        """The verdict on ranks that are all done: `clean` only if their results are right. None to ask again."""
        comparison = self.compare(final)
        if comparison is None:
            return None
        if comparison.missing:
            return uncompared(self._judge(), comparison.missing)
        verdict = self._judge(wrong_numbers=comparison.wrong)
        if comparison.wrong:
            return verdict
        compared = [comparison.evidence] if comparison.evidence else []
        silences = sorted(self._silences.values(), key=lambda silence: -silence[0])
        silences = [s for s in silences if s[0] >= SLOW_WINDOWS * self.options.quiet_window_s]
        if not silences:
            return with_evidence(verdict, compared)
        (_, slowest), *others = silences
        also = [f"for {waited_s:.1f} s also: {other.evidence[0]}" for waited_s, other in others if other.evidence]
        return with_evidence(slowest, [*also, "then all ranks finished", *compared])

    def _last_event_ns(self) -> int:
        return max(self.started_ns, *(self._on_my_clock(tail, tail.last_event_ns()) for tail in self._tails))

    def _on_my_clock(self, tail: Tail, then_ns: int) -> int:
        """A moment on the clock of a rank's host, 0 for never."""
        return then_ns and then_ns + self._here.clock_ahead_ns(tail.who())

    def _running(self) -> dict[int, psutil.Process | None]:
        return self._system.running({rank: tail.who() for rank, tail in enumerate(self._tails)})

    def _somebody_died(self, now_ns: int) -> bool:
        """A rank is gone or failed, or all processes are, and nobody else is about to say something."""
        gone = None in self._running().values() or not self.job_alive() or self._others.someone_is_gone()
        if not gone and not any(_last_kind(tail) == Kind.FAILED for tail in self._tails):
            self._died_ns = 0
            return False
        self._died_ns = self._died_ns or now_ns
        quiet_ns = now_ns - max(self._died_ns, self._last_event_ns())
        return quiet_ns > DEATH_GRACE_S * 1e9 or now_ns - self._died_ns > DEATH_PATIENCE_S * 1e9

    def _collect_evidence(self) -> list[str]:
        pids = {rank: it.pid for rank, it in self._running().items() if it is not None}
        question = self._others.ask()
        gaps = evidence.collect(self.run_dir, pids, evidence.PATIENCE_S)
        return gaps + self._others.answers(question, ANSWER_PATIENCE_S)

    def _remember(self, verdict: Verdict) -> None:
        """Keep the longest silence in which most ranks waited for few that worked on; the reverse is a busy start. What
        gives signs of life, such as a build before the first step, is no silence, but in a collective that others wait
        in it is a wait like any other.
        """
        num_waiting = sum(position.state in ("blocked", "locked") for position in verdict.ranks)
        if verdict.verdict != "slow" or num_waiting <= len(verdict.culprits):
            return
        waited_s = _waited_for_a_build(verdict)
        if not waited_s:
            heard_ns = max(self._on_my_clock(tail, tail.heartbeat_ns()) for tail in self._tails)
            if time.monotonic_ns() - heard_ns < self.options.quiet_window_s * 1e9:
                return
            waited_s = verdict.quiet_s
        before_s, _ = self._silences.get(verdict.culprits, (0.0, verdict))
        if waited_s > before_s and not set(verdict.culprits) <= self._stopped():
            self._silences[verdict.culprits] = waited_s, verdict

    def _stopped(self) -> set[int]:
        """Ranks that somebody stopped from outside, which says nothing about the run."""
        return {rank for rank, why in self._facts.excused.items() if why == STOPPED}

    def _notice(self, verdict: Verdict) -> None:
        """Tell who waits for whom; a silence in which nobody waits for anybody is no news."""
        sentences = verdict.sentences()
        waiting = any(position.state in ("blocked", "locked") for position in verdict.ranks)
        news = [re.sub(r"heartbeat [\d.]+ s ago", "", sentence) for sentence in sentences]
        if waiting and news != self._noticed:
            self._noticed = news
            self.notice(f"{verdict.verdict}: {'; '.join(sentences)}")

    def _write(self, verdict: Verdict) -> dict[str, Any]:
        now_ns = time.monotonic_ns()
        document = {
            **self.describe(verdict),
            "system": self._facts.to_json(),
            "interrupted": self.interrupted(),
            "seconds": {
                "stall_to_verdict": round((now_ns - self._last_event_ns()) / 1e9, 3),
                "total": round((now_ns - self.started_ns) / 1e9, 3),
            },
        }
        write_json(self.run_dir.verdict, document, durable=True)
        return document


def not_decided(verdict: Verdict) -> Verdict:
    """Where nothing had been decided, that ranks still worked when the user had enough is no finding."""
    if verdict.verdict == "slow":
        verdict = dataclasses.replace(verdict, verdict="inconclusive", culprits=(), confidence="undecided")
    return with_evidence(verdict, ["the run was interrupted before it was decided"])


def _waited_for_a_build(verdict: Verdict) -> float:
    """Seconds that all who wait in collectives have done so, if all who are waited for build; else 0."""
    awaited = [position for position in verdict.ranks if position.rank in verdict.culprits]
    if not awaited or any(position.state != "building" for position in awaited):
        return 0.0
    return min((position.since_s for position in verdict.ranks if position.state == "blocked"), default=0.0)


def uncompared(verdict: Verdict, why: str) -> Verdict:
    """The verdict on ranks whose results were not compared: it cannot be `clean`."""
    if verdict.verdict == "clean":
        verdict = dataclasses.replace(verdict, verdict="inconclusive", confidence="undecided")
    return with_evidence(verdict, [f"{why}, so the tokens were not compared"])


def with_evidence(verdict: Verdict, texts: list[str]) -> Verdict:
    return dataclasses.replace(verdict, evidence=(*verdict.evidence, *texts))


def _last_kind(tail: Tail) -> int | None:
    event = tail.last_event()
    return event.kind if event else None
