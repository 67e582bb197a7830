"""Several hosts: one watcher decides and ends the run, and on each other host a lookout is its eyes and hands.

Processes can be looked at, asked and ended on their own host only: there the lookout does it. Watcher and lookouts talk
through files in the run directory, which all hosts see:

asked                  how many times the watcher has wanted evidence
lookouts/rank008.json  what the lookout of the host whose first rank that is has seen last, and up to which of the
                       watcher's questions it has collected evidence

What the ranks did is in their witnesses, which the watcher reads by itself, also of ranks whose lookout is gone.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from repro.hosts import processes
from repro.hosts.host import READ_FAILURES, Host
from repro.hosts.options import WatchOptions
from repro.hosts.system import System
from repro.store.run_dir import RunDir, read_json, write_json
from repro.trace.format import Identity
from repro.trace.tails import Tails
from repro.verdict.facts import Facts
from repro.verdict.result import name_ranks

POLL_S = 0.1
LOOK_S = 0.5
LETTING_GO_S = 5.0
"""How long ranks of a decided run may take to end by themselves."""

OVERTIME_S = 30.0
"""How long after the run's deadline a lookout ends, should the watcher be gone: by then the ranks have ended too."""

UNHEARD_S = 10.0
"""What a lookout said is not believed any more when it has said nothing new for so long."""


@dataclass(frozen=True)
class Report:
    """What an agent has seen of the ranks of its host.

    beat         grows with every look
    ranks        of its host, as far as they have opened their witnesses
    facts        about these; `died` is on the clock of its host
    answered     up to which question it has collected evidence
    unanswered   rank -> what of it the rank did not leave
    """

    beat: int
    boot_id: str
    wall_offset_ns: int
    ranks: tuple[int, ...]
    facts: Facts
    answered: int = 0
    unanswered: Mapping[int, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "beat": self.beat,
            "boot_id": self.boot_id,
            "wall_offset_ns": self.wall_offset_ns,
            "ranks": list(self.ranks),
            "facts": self.facts.to_json(),
            "answered": self.answered,
            "unanswered": {str(rank): what for rank, what in self.unanswered.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what ``to_json`` does not write."""
        return cls(
            int(document["beat"]),
            str(document["boot_id"]),
            int(document["wall_offset_ns"]),
            tuple(map(int, document["ranks"])),
            Facts.from_json(document["facts"]),
            int(document["answered"]),
            {int(rank): str(what) for rank, what in document["unanswered"].items()},
        )


class Lookout:
    """The agent of a host: it looks after the ranks there until the run is decided, and then sees them end."""

    def __init__(self, run_dir: RunDir, options: WatchOptions, first_rank: int, host: Host | None = None) -> None:
        self._run_dir, self._options = run_dir, options
        self._path = run_dir.lookout(first_rank)
        self._host = host or Host()
        self._tails = Tails(run_dir, options.num_ranks, self._host.here)
        self._system = System(options.quiet_window_s, self._host)
        self._answered = 0
        self._unanswered: dict[int, str] = {}
        self._beat = 0
        self._looked_ns = 0

    def run(self) -> None:
        """Look after the ranks; returns when they have ended."""
        self._path.parent.mkdir(exist_ok=True)
        deadline_ns = self._host.now_ns() + int((self._options.deadline_s + OVERTIME_S) * 1e9)
        while self._host.now_ns() < deadline_ns and not self._run_dir.verdict.exists():
            try:
                self.poll()
            except READ_FAILURES:  # the next look may meet no failure
                if not self._path.parent.exists():
                    break  # the watcher has tidied up
            except Exception:  # whatever fails here, the ranks need an agent that ends them
                traceback.print_exc()
            self._pause()
        self._end_ranks()

    def _pause(self) -> None:
        asleep_ns = self._host.now_ns()
        self._host.sleep(POLL_S)
        self._system.note_late((self._host.now_ns() - asleep_ns) / 1e9 - POLL_S)

    def poll(self) -> None:
        """Collect evidence if the watcher asks for it, and report twice a second."""
        self._tails.open()
        asked = times_asked(self._run_dir)
        if asked > self._answered:
            self._unanswered = self._host.collect(self._run_dir, self._pids())
            self._answered = asked
            self._report()
            self._system.begin_measuring(self._pids())  # to write evidence takes a processor, which says nothing
        elif self._host.now_ns() - self._looked_ns >= LOOK_S * 1e9:
            self._system.measure(self._pids())
            self._report()

    def _report(self) -> None:
        self._looked_ns = self._host.now_ns()
        self._beat += 1
        running = self._running()
        ours = [rank for rank, who in self._tails.writers().items() if self._system.is_here(who)]
        witnesses, _ = self._tails.read(ours)  # the watcher names those that cannot be read
        facts = self._system.look(witnesses, running)
        here = self._host.here
        report = Report(
            self._beat, here.boot_id, here.wall_offset_ns, tuple(running), facts, self._answered, self._unanswered
        )
        write_json(self._path, report.to_json())

    def _running(self) -> dict[int, psutil.Process | None]:
        return self._system.running(self._tails.writers())

    def _alive(self) -> list[psutil.Process]:
        return [found for found in self._running().values() if found is not None]

    def _pids(self) -> dict[int, int]:
        return {rank: found.pid for rank, found in self._running().items() if found is not None}

    def _end_ranks(self) -> None:
        """Ranks that only waited to be released leave by themselves, others are ended."""
        deadline_ns = self._host.now_ns() + int(LETTING_GO_S * 1e9)
        while self._host.now_ns() < deadline_ns:
            with contextlib.suppress(*READ_FAILURES):  # the next look may meet no failure
                if not self._alive() or not self._tails.all_done():
                    break
            self._host.sleep(POLL_S)
        with contextlib.suppress(*READ_FAILURES):
            processes.kill(self._alive())
            self._report()


@dataclass
class Others:
    """The watcher's side: what the agents of other hosts said."""

    run_dir: RunDir
    host: Host
    _heard: dict[Path, tuple[Report, int]] = field(default_factory=dict)  # with the moment, on the watcher's clock
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def reports(self) -> list[Report]:
        """Those of agents that are at work."""
        self._listen()
        now_ns = self.host.now_ns()
        return [report for report, heard_ns in self._heard.values() if now_ns - heard_ns < UNHEARD_S * 1e9]

    def silent(self) -> list[str]:
        """A sentence for each agent that was at work and is not any more."""
        self._listen()
        now_ns = self.host.now_ns()
        return [
            f"the lookout of {name_ranks(report.ranks)} was last heard {(now_ns - heard_ns) / 1e9:.0f} s ago: they are "
            "not seen any more"
            for report, heard_ns in self._heard.values()
            if now_ns - heard_ns >= UNHEARD_S * 1e9
        ]

    def merged(self, facts: Facts) -> Facts:
        """What all hosts' systems say, on the clock of this one."""
        for report in self.reports():
            there = Identity(0, 1, boot_id=report.boot_id, wall_offset_ns=report.wall_offset_ns)
            facts = facts.joined(report.facts, self.host.here.clock_ahead_ns(there) / 1e9)
        return facts

    def someone_is_gone(self) -> bool:
        return any(not alive for report in self.reports() for alive in report.facts.alive.values())

    def someone_runs(self) -> bool:
        return any(alive for report in self.reports() for alive in report.facts.alive.values())

    def ask(self) -> int:
        """Have the agents collect evidence; the number of the question."""
        question = times_asked(self.run_dir) + 1
        if self.reports():
            with contextlib.suppress(OSError):  # a full disk: then none comes, and that is said
                write_json(self.run_dir.asked, question)
        return question

    def answers(self, question: int, patience_s: float) -> dict[int, str]:
        """Wait for the agents at most ``patience_s`` seconds; returns what of the evidence each rank did not leave."""
        deadline_ns = self.host.now_ns() + int(patience_s * 1e9)
        while any(report.answered < question for report in self.reports()) and self.host.now_ns() < deadline_ns:
            self.host.sleep(POLL_S / 2)
        unanswered: dict[int, str] = {}
        for report in self.reports():
            late = dict.fromkeys(report.ranks, "evidence") if report.answered < question else report.unanswered
            unanswered.update(late)
        return unanswered

    def _listen(self) -> None:
        for path in sorted(self.run_dir.lookouts.glob("rank*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                status = path.stat()  # a report replaces the file of the one before
                stamp = status.st_ino, status.st_mtime_ns
                if self._stamps.get(path) != stamp:
                    report = Report.from_json(read_json(path))
                    self._stamps[path] = stamp
                    self._heard[path] = report, self.host.now_ns()


def times_asked(run_dir: RunDir) -> int:
    """How often the watcher has wanted evidence."""
    try:
        return int(read_json(run_dir.asked))
    except (OSError, ValueError, TypeError):
        return 0


def tidy(run_dir: RunDir, leftovers: Iterable[Path] = ()) -> None:
    """Remove what is of use to nobody once the run is decided, files that a killed process was writing included."""
    partials = run_dir.root.glob("**/.*.partial")
    for path in (run_dir.asked, *run_dir.lookouts.glob("*"), *partials, *leftovers):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run_dir.lookouts.rmdir()
