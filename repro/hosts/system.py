"""Collect the facts about the ranks of this host: which processes run or are suspended, their CPU use, lock holders.

A witness shows what a rank did last. The facts show what the process of the rank does now. Ranks of other hosts are
left out: an agent on each host (`repro.hosts.agent`) observes the ranks of that host.
"""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from repro.hosts import locks
from repro.hosts.host import Host
from repro.trace.witness.file import Witness
from repro.trace.witness.format import Identity, Kind
from repro.verdict.facts import Facts

STOPPED = "stopped by a signal"
SHORTEST_MEASURE_S = 0.1
"""Shortest time in seconds over which CPU use is measured, because the system counts it in ticks of 10 ms."""


class System:
    """Collects the facts about the ranks of this host. Use one object for the whole run.

    The object remembers when it saw each rank dead, since when each lock has no holder, and the last measured CPU use.

    patience_s   A lock is reported to have no holder only after it had no holder for this many seconds. For a shorter
                 time, a lock without a holder is normal: a waiting process tests the lock only now and then.
    """

    def __init__(self, patience_s: float, host: Host | None = None) -> None:
        self._patience_s = patience_s
        self._host = host or Host()
        self._unheld_since: dict[str, float] = {}
        self._used: dict[int, tuple[float, float]] = {}  # rank -> (CPU seconds, seconds runnable without a CPU)
        self._stolen_s = 0.0  # stolen seconds of the host at the last measurement
        self._measured_at = 0.0
        self._late_s = 0.0
        self._cores: dict[int, float] = {}
        self._starved: dict[int, float] = {}
        self._died: dict[int, float] = {}

    def look(self, witnesses: Mapping[int, Witness], running: Mapping[int, psutil.Process | None]) -> Facts:
        """Collect the facts, with the CPU use of the last measurement.

        running: the result of :meth:`running`. Call :meth:`running` first, and read the witnesses after it. In the
        other order, a rank that finishes and ends in between would count as dead, because its witness was read before
        the rank recorded that it is done.
        """
        return Facts(
            {rank: process is not None for rank, process in running.items()},
            {rank: STOPPED for rank, process in running.items() if process and self._host.is_stopped(process)},
            self._lock_holders(witnesses),
            dict(self._cores),
            dict(self._starved),
            dict(self._died),
        )

    def running(self, writers: Mapping[int, Identity]) -> dict[int, psutil.Process | None]:
        """Find the process of each rank of this host that has opened its witness; None for a process that has ended.

        A rank whose process is hidden from this user is left out.

        writers: for each rank of the job, the header of its witness, which describes the process that wrote it
        """
        here = {rank: writer for rank, writer in writers.items() if writer.pid and self.is_here(writer)}
        processes = self._find(here)
        if any(process is None and rank not in self._died for rank, process in processes.items()):
            # A process that was checked before the dead one may have died by now, too. So check all processes again:
            # all deaths up to now then get the same time.
            processes = self._find({rank: here[rank] for rank, process in processes.items() if process}) | {
                rank: None for rank, process in processes.items() if process is None
            }
            now_s = self._now_s()
            for rank, process in processes.items():
                if process is None:
                    self._died.setdefault(rank, now_s)
        return processes

    def begin_measuring(self, pids: Mapping[int, int]) -> None:
        """Start to measure the CPU use of the ranks. pids: the pid of each rank."""
        self._used = self._read_use(pids)
        self._stolen_s = self._host.stolen_seconds()
        self._late_s = 0.0
        self._measured_at = self._now_s()

    def measure(self, pids: Mapping[int, int]) -> None:
        """Measure the CPU use since the last call of this method or of :meth:`begin_measuring`.

        If less than SHORTEST_MEASURE_S seconds have passed since then, the CPU use is unknown until the next call.

        pids: the pid of each rank
        """
        before, measured_at, stolen_s, late_s = self._used, self._measured_at, self._stolen_s, self._late_s
        self.begin_measuring(pids)
        passed_s = self._measured_at - measured_at
        if not before or passed_s < SHORTEST_MEASURE_S:
            self._cores, self._starved = {}, {}
            return
        # The schedstat of a thread does not count stolen time. Stolen time shows as steal time of the host, and as late
        # wake-ups of this process.
        host_share = max(self._stolen_s - stolen_s, late_s) / passed_s
        shares = {
            rank: [max(0.0, this - last) / passed_s for this, last in zip(seconds, before[rank], strict=True)]
            for rank, seconds in self._used.items()
            if rank in before
        }
        self._cores = {rank: round(cores, 3) for rank, (cores, _) in shares.items()}
        self._starved = {rank: round(max(share, host_share), 3) for rank, (_, share) in shares.items()}

    def note_late(self, late_s: float) -> None:
        """Record that this process woke up ``late_s`` seconds too late.

        :meth:`measure` then counts these seconds as time in which the ranks, too, got no processor.
        """
        self._late_s += max(0.0, late_s)

    def is_here(self, writer: Identity) -> bool:
        """Whether the process that wrote a witness runs, or ran, on this host and in this pid namespace.

        writer: the header of the witness, which describes this process
        """
        return writer.shares_processes(self._host.here)

    def _now_s(self) -> float:
        return self._host.now_ns() / 1e9

    def _find(self, writers: Mapping[int, Identity]) -> dict[int, psutil.Process | None]:
        processes: dict[int, psutil.Process | None] = {}
        for rank, writer in writers.items():
            try:
                processes[rank] = self._host.find(writer)
            except psutil.AccessDenied:
                continue
        return processes

    def _read_use(self, pids: Mapping[int, int]) -> dict[int, tuple[float, float]]:
        used = self._host.cpu_seconds(pids.values())
        return {rank: (used[pid], self._host.starved_seconds(pid)) for rank, pid in pids.items()}

    def _lock_holders(self, witnesses: Mapping[int, Witness]) -> dict[int, tuple[str, int]]:
        waiting: dict[str, dict[int, int]] = {}  # lock -> (waiting rank -> its pid)
        for rank, witness in witnesses.items():
            if witness.last is not None and witness.last.kind == Kind.LOCK_WAIT and self.is_here(witness.writer):
                waiting.setdefault(witness.text(witness.last.sig), {})[rank] = witness.writer.pid
        ranks = {witness.writer.pid for witness in witnesses.values() if self.is_here(witness.writer)}
        holders: dict[int, tuple[str, int]] = {}
        now_s = self._now_s()
        for name, waiters in waiting.items():
            pid = self._host.lock_holder(name, list(waiters.values()))
            since_s = self._unheld_since.setdefault(name, now_s)
            if pid != locks.NOBODY:
                del self._unheld_since[name]
            if pid > 0:
                pid = next((ancestor for ancestor in self._host.with_ancestors(pid) if ancestor in ranks), pid)
            if pid > 0 or (pid == locks.NOBODY and now_s - since_s >= self._patience_s):
                holders.update(dict.fromkeys(waiters, (name, pid)))
        return holders
