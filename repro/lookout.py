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
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from repro import evidence, process
from repro.layout import Identity, Kind
from repro.options import WatchOptions
from repro.parse import WitnessError
from repro.record import myself
from repro.rundir import RunDir, read_json, write_json
from repro.system import System
from repro.verdict.facts import Facts
from repro.verdict.result import name_ranks
from repro.witness import Tail, Witness

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
    """What a lookout has seen.

    beat       grows with every look
    ranks      of its host, as far as they have said who they are
    facts      about these; `died` is on the clock of its host
    answered   up to which question it has collected evidence
    gaps       what of it did not come, in sentences
    """

    beat: int
    boot_id: str
    wall_offset_ns: int
    ranks: tuple[int, ...]
    facts: Facts
    answered: int = 0
    gaps: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        listed = {"ranks": list(self.ranks), "facts": self.facts.to_json(), "gaps": list(self.gaps)}
        return {"beat": self.beat, "boot_id": self.boot_id, "wall_offset_ns": self.wall_offset_ns,
                "answered": self.answered, **listed}  # fmt: skip

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for what ``to_json`` does not write."""
        return cls(
            int(told["beat"]), str(told["boot_id"]), int(told["wall_offset_ns"]), tuple(map(int, told["ranks"])),
            Facts.from_json(told["facts"]), int(told["answered"]), tuple(map(str, told["gaps"])),
        )  # fmt: skip


class Lookout:
    """Looks after the ranks of this host until the run is decided, and then sees them end."""

    def __init__(self, run_dir: RunDir, options: WatchOptions, first_rank: int) -> None:
        self._run_dir, self._options = run_dir, options
        self._path = run_dir.lookout(first_rank)
        self._here = myself(0, 1)
        self._tails = [Tail(run_dir.witness(rank)) for rank in range(options.num_ranks)]
        self._system = System(options.quiet_window_s)
        self._answered = 0
        self._gaps: tuple[str, ...] = ()
        self._beat = 0

    def run(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        deadline = time.monotonic() + self._options.deadline_s + OVERTIME_S
        looked_at = 0.0
        while time.monotonic() < deadline and not self._run_dir.verdict.exists():
            asked = times_asked(self._run_dir)
            if asked > self._answered:
                self._gaps = tuple(evidence.collect(self._run_dir, self._pids(), evidence.PATIENCE_S))
                self._answered = asked
            elif time.monotonic() - looked_at < LOOK_S:
                time.sleep(POLL_S)
                continue
            looked_at = time.monotonic()
            try:
                self._report()
            except OSError:
                if not self._path.parent.exists():
                    break  # the watcher has tidied up
        self._let_go()

    def _report(self) -> None:
        self._beat += 1
        facts = self._system.look(self._witnesses())
        here, ranks = self._here, tuple(facts.alive)
        report = Report(self._beat, here.boot_id, here.wall_offset_ns, ranks, facts, self._answered, self._gaps)
        write_json(self._path, report.to_json())

    def _witnesses(self) -> dict[int, Witness]:
        found = {}
        for rank, tail in enumerate(self._tails):
            if self._system.is_here(tail.who()):
                with contextlib.suppress(WitnessError):  # the watcher says so
                    found[rank] = tail.witness()
        return found

    def _running(self) -> dict[int, psutil.Process]:
        writers = {rank: tail.who() for rank, tail in enumerate(self._tails)}
        return {rank: it for rank, it in self._system.running(writers).items() if it is not None}

    def _pids(self) -> dict[int, int]:
        return {rank: it.pid for rank, it in self._running().items()}

    def _let_go(self) -> None:
        """Ranks that only waited for the watcher's word leave by themselves, others are ended."""
        deadline = time.monotonic() + LETTING_GO_S
        while self._running() and self._all_done() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        process.kill(self._running().values())
        with contextlib.suppress(OSError):
            self._report()

    def _all_done(self) -> bool:
        return all((last := tail.last_event()) is not None and last.kind == Kind.DONE for tail in self._tails)


@dataclass
class Others:
    """The watcher's side: what the lookouts of other hosts said."""

    run_dir: RunDir
    here: Identity
    _heard: dict[Path, tuple[Report, float]] = field(default_factory=dict)

    def reports(self) -> list[Report]:
        """Those of lookouts that are at work."""
        self._listen()
        return [report for report, at in self._heard.values() if time.monotonic() - at < UNHEARD_S]

    def silent(self) -> list[str]:
        """A sentence for each lookout that was at work and is not any more."""
        self._listen()
        now = time.monotonic()
        return [
            f"the lookout of {name_ranks(report.ranks)} was last heard {now - at:.0f} s ago: they are not seen any more"
            for report, at in self._heard.values()
            if now - at >= UNHEARD_S
        ]

    def merged(self, mine: Facts) -> Facts:
        """What all hosts' systems say, on the clock of this one."""
        facts = mine
        for report in self.reports():
            there = Identity(0, 1, boot_id=report.boot_id, wall_offset_ns=report.wall_offset_ns)
            facts = facts.joined(report.facts, self.here.clock_ahead_ns(there) / 1e9)
        return facts

    def someone_is_gone(self) -> bool:
        return any(not alive for report in self.reports() for alive in report.facts.alive.values())

    def someone_runs(self) -> bool:
        return any(alive for report in self.reports() for alive in report.facts.alive.values())

    def ask(self) -> int:
        """Have the lookouts collect evidence; the number of the question."""
        question = times_asked(self.run_dir) + 1
        if self.reports():
            with contextlib.suppress(OSError):  # a full disk: then none comes, and that is said
                write_json(self.run_dir.asked, question)
        return question

    def answers(self, question: int, patience_s: float) -> list[str]:
        """What of the evidence did not come, in sentences, after waiting for it at most ``patience_s``."""
        deadline = time.monotonic() + patience_s
        while any(report.answered < question for report in self.reports()) and time.monotonic() < deadline:
            time.sleep(POLL_S / 2)
        gaps = [gap for report in self.reports() if report.answered >= question for gap in report.gaps]
        late = [rank for report in self.reports() if report.answered < question for rank in report.ranks]
        return gaps + ([f"no evidence came from the host of {name_ranks(late)}"] if late else [])

    def _listen(self) -> None:
        for path in sorted(self.run_dir.lookouts.glob("rank*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                report = Report.from_json(read_json(path))
                if path not in self._heard or self._heard[path][0] != report:
                    self._heard[path] = report, time.monotonic()


def times_asked(run_dir: RunDir) -> int:
    try:
        return int(read_json(run_dir.asked))
    except (OSError, ValueError, TypeError):
        return 0


def tidy(run_dir: RunDir, leftovers: Iterable[Path] = ()) -> None:
    """Remove what is of use to nobody once the run is decided."""
    for path in (run_dir.asked, *run_dir.lookouts.glob("*"), *leftovers):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run_dir.lookouts.rmdir()
