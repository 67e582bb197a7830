"""The agent of a host: it observes, signals and ends the ranks of its host for a watcher on another host.

A process can be inspected, signalled and ended only on its own host. So one host runs the watcher, which gives the
verdict, and every other host runs an agent. Watcher and agents communicate through files in the run directory, which
all hosts see:

evidence_request     the number of the watcher's latest request for evidence; the first request has the number 1
agents/rank008.json  the last status of one agent, named after the first rank of its host. The status has the number of
                     the latest request that the agent has answered

The watcher reads all witnesses itself, also those of ranks whose agent has ended.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from repro.hosts import processes
from repro.hosts.host import READ_FAILURES, Host
from repro.hosts.options import WatchOptions
from repro.hosts.system import System
from repro.store.run_dir import RunDir, read_json, write_json
from repro.store.schema import read_typed, to_json
from repro.trace.witness.format import Identity
from repro.trace.witness.tails import Tails
from repro.verdict.facts import Facts
from repro.verdict.result import name_ranks

POLL_S = 0.1
LOOK_S = 0.5
EXIT_PATIENCE_S = 5.0
"""Seconds in which ranks may exit by themselves after the verdict. After that the agent kills them."""

OVERTIME_S = 30.0
"""Seconds after the run's deadline until an agent gives up a watcher that no longer answers. It kills its ranks and
ends."""

STATUS_EXPIRY_S = 10.0
"""Age in seconds from which the last status of an agent is no longer used."""


@dataclass(frozen=True)
class AgentStatus:
    """The latest observation that one agent reported.

    beat             number of the observation, from 1
    boot_id          Linux's boot id of the agent's host; the witnesses of this host's ranks have the same id
    wall_offset_ns   wall clock minus monotonic clock of the agent's host
    ranks            ranks of the agent's host that have opened their witnesses
    facts            facts about these ranks; the times in `Facts.died` are on the monotonic clock of the agent's host
    answered         number of the latest evidence request that the agent has answered
    unanswered       a dict from rank to the evidence that is missing, for each rank that did not write all of it
    """

    beat: int
    boot_id: str
    wall_offset_ns: int
    ranks: tuple[int, ...]
    facts: Facts
    answered: int = 0
    unanswered: Mapping[int, str] = field(default_factory=dict)


class HostAgent:
    """Observes the ranks of this host until the watcher has given the verdict, then ends ranks that do not exit."""

    def __init__(self, run_dir: RunDir, options: WatchOptions, first_rank: int, host: Host | None = None) -> None:
        self._run_dir, self._options = run_dir, options
        self._path = run_dir.agent(first_rank)
        self._host = host or Host()
        self._tails = Tails(run_dir, options.num_ranks, self._host.here)
        self._system = System(options.quiet_window_s, self._host)
        self._answered = 0
        self._unanswered: dict[int, str] = {}
        self._beat = 0
        self._reported_ns = 0

    def run(self) -> None:
        """Observe the ranks of this host until the watcher has given the verdict, then kill the ranks that still run.

        If all ranks of the run have recorded that they are done, the ranks of this host first have EXIT_PATIENCE_S
        seconds to exit by themselves. If there is no verdict OVERTIME_S seconds after the run's deadline, the agent
        kills its ranks, too.
        """
        self._path.parent.mkdir(exist_ok=True)
        deadline_ns = self._host.now_ns() + int((self._options.deadline_s + OVERTIME_S) * 1e9)
        while self._host.now_ns() < deadline_ns and not self._run_dir.verdict.exists():
            try:
                self.poll()
            except READ_FAILURES:  # the next poll may succeed
                if not self._path.parent.exists():
                    break  # the watcher has removed the run's temporary files, among them the status file
            except Exception:  # the ranks still need an agent that ends them
                traceback.print_exc()
            self._pause()
        self._end_ranks()

    def _pause(self) -> None:
        asleep_ns = self._host.now_ns()
        self._host.sleep(POLL_S)
        self._system.note_late((self._host.now_ns() - asleep_ns) / 1e9 - POLL_S)

    def poll(self) -> None:
        """Collect the evidence that the watcher has newly requested, and write the status.

        Without a new request, write the status only if the last status is at least LOOK_S seconds old.
        """
        self._tails.open()
        request = latest_request(self._run_dir)
        if request > self._answered:
            self._unanswered = self._host.collect(self._run_dir, self._pids())
            self._answered = request
            self._write_status()
            self._system.begin_measuring(self._pids())  # processor use while a rank writes evidence is no sign of work
        elif self._host.now_ns() - self._reported_ns >= LOOK_S * 1e9:
            self._system.measure(self._pids())
            self._write_status()

    def _write_status(self) -> None:
        self._reported_ns = self._host.now_ns()
        self._beat += 1
        running = self._running()
        local_ranks = [rank for rank, writer in self._tails.writers().items() if self._system.is_here(writer)]
        witnesses, _ = self._tails.read(local_ranks)  # the watcher itself reports files that cannot be read
        facts = self._system.look(witnesses, running)
        here = self._host.here
        status = AgentStatus(
            self._beat, here.boot_id, here.wall_offset_ns, tuple(running), facts, self._answered, self._unanswered
        )
        write_json(self._path, to_json(status))

    def _running(self) -> dict[int, psutil.Process | None]:
        return self._system.running(self._tails.writers())

    def _alive(self) -> list[psutil.Process]:
        return [process for process in self._running().values() if process is not None]

    def _pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in self._running().items() if process is not None}

    def _end_ranks(self) -> None:
        """Kill the ranks of this host that still run. See :meth:`run` for the time that they have to exit before."""
        deadline_ns = self._host.now_ns() + int(EXIT_PATIENCE_S * 1e9)
        while self._host.now_ns() < deadline_ns:
            with contextlib.suppress(*READ_FAILURES):  # the next poll may succeed
                if not self._alive() or not self._tails.all_done():
                    break
            self._host.sleep(POLL_S)
        with contextlib.suppress(*READ_FAILURES):
            processes.kill(self._alive())
            self._write_status()


@dataclass
class RemoteHosts:
    """The watcher's access to the agents on other hosts: reads their statuses, and requests evidence from them."""

    run_dir: RunDir
    host: Host
    _latest: dict[Path, tuple[AgentStatus, int]] = field(
        default_factory=dict
    )  # status file of each agent -> its last status, and the time of arrival on the watcher's clock
    _stamps: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def statuses(self) -> list[AgentStatus]:
        """Return the last status of each agent, without statuses that arrived at least STATUS_EXPIRY_S seconds ago."""
        self._read_new()
        now_ns = self.host.now_ns()
        return [status for status, read_ns in self._latest.values() if now_ns - read_ns < STATUS_EXPIRY_S * 1e9]

    def silent(self) -> list[str]:
        """Return a sentence for each agent whose last status arrived at least STATUS_EXPIRY_S seconds ago."""
        self._read_new()
        now_ns = self.host.now_ns()
        return [
            f"the agent of {name_ranks(status.ranks)} sent its last status {(now_ns - read_ns) / 1e9:.0f} s ago: the "
            "processes of these ranks are no longer observed"
            for status, read_ns in self._latest.values()
            if now_ns - read_ns >= STATUS_EXPIRY_S * 1e9
        ]

    def merged(self, facts: Facts) -> Facts:
        """Join ``facts``, those of this host, with the facts of all agents. All times are then on this host's clock."""
        for status in self.statuses():
            remote = Identity(0, 1, boot_id=status.boot_id, wall_offset_ns=status.wall_offset_ns)
            facts = facts.joined(status.facts, self.host.here.clock_ahead_ns(remote) / 1e9)
        return facts

    def any_ended(self) -> bool:
        """Whether the process of a rank on another host has ended, according to the last status of the agent there."""
        return any(not alive for status in self.statuses() for alive in status.facts.alive.values())

    def any_running(self) -> bool:
        """Whether the process of a rank on another host runs, according to the last status of the agent there."""
        return any(alive for status in self.statuses() for alive in status.facts.alive.values())

    def request_evidence(self) -> int:
        """Ask all agents to collect evidence from their ranks. Returns the number of this request."""
        request = latest_request(self.run_dir) + 1
        if self.statuses():
            # if the disk is full, the request is lost, and `answers` returns all evidence as missing
            with contextlib.suppress(OSError):
                write_json(self.run_dir.evidence_request, request)
        return request

    def answers(self, request: int, patience_s: float) -> dict[int, str]:
        """Wait at most ``patience_s`` seconds until the agents have answered the request with this number.

        Returns a dict from rank to the missing evidence, for each rank that did not write all of it. If the agent of a
        rank has not answered, all evidence of this rank counts as missing.
        """
        deadline_ns = self.host.now_ns() + int(patience_s * 1e9)
        while any(status.answered < request for status in self.statuses()) and self.host.now_ns() < deadline_ns:
            self.host.sleep(POLL_S / 2)
        unanswered: dict[int, str] = {}
        for status in self.statuses():
            is_late = status.answered < request
            unanswered.update(dict.fromkeys(status.ranks, "evidence") if is_late else status.unanswered)
        return unanswered

    def _read_new(self) -> None:
        for path in sorted(self.run_dir.agents.glob("rank*.json")):
            with contextlib.suppress(OSError, ValueError):
                stat = path.stat()  # every status replaces the file, so a new inode means a new status
                stamp = stat.st_ino, stat.st_mtime_ns
                if self._stamps.get(path) != stamp:
                    status = read_typed(path, AgentStatus)
                    self._stamps[path] = stamp
                    self._latest[path] = status, self.host.now_ns()


def latest_request(run_dir: RunDir) -> int:
    """Return the number of the watcher's latest request for evidence; 0 before the first request."""
    try:
        return int(read_json(run_dir.evidence_request))
    except (OSError, ValueError, TypeError):
        return 0


def remove_temporary_files(run_dir: RunDir, leftovers: Iterable[Path] = ()) -> None:
    """Remove the files that only a running job needs, and incomplete files that a killed process was writing.

    leftovers: more files to remove
    """
    partials = run_dir.root.glob("**/.*.partial")
    for path in (run_dir.evidence_request, *run_dir.agents.glob("*"), *partials, *leftovers):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        run_dir.agents.rmdir()
