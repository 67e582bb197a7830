"""What this host's system says about its ranks: who lives, is stopped, uses a processor, holds a lock.

A witness tells what a rank last said; this tells what its process does meanwhile. Ranks of other hosts are left out:
their lookout sees them (`repro.lookout`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

import psutil

from repro import locks, process
from repro.layout import Identity, Kind
from repro.record import myself
from repro.verdict.facts import Facts
from repro.witness import Witness

STOPPED = "stopped by a signal"


class System:
    """Looks again and again; what takes time to see, like the use of a processor, is seen from the second look on.

    patience_s   how long a lock file must have had no holder before nobody is said to hold it: whoever waits for it
                 may only look now and then
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._here = myself(0, 1)
        self._unheld_since: dict[str, float] = {}
        self._used: dict[int, tuple[float, float]] = {}  # rank -> seconds of processors, and without one
        self._looked_at = 0.0
        self._died: dict[int, float] = {}

    def look(self, witnesses: Mapping[int, Witness]) -> Facts:
        running = self.running({rank: witness.who for rank, witness in witnesses.items()})
        return Facts(
            {rank: it is not None for rank, it in running.items()},
            {rank: STOPPED for rank, it in running.items() if it is not None and process.is_stopped(it)},
            self._lock_holders(witnesses),
            *self.use({rank: it.pid for rank, it in running.items() if it is not None}),
            dict(self._died),
        )

    def running(self, writers: Mapping[int, Identity]) -> dict[int, psutil.Process | None]:
        """The process of each rank of this host that came far enough to say its pid, None where it has ended."""
        found = {rank: process.find(who) for rank, who in writers.items() if who.pid and self.is_here(who)}
        if any(it is None and rank not in self._died for rank, it in found.items()):
            # Those that were looked at first may have died before one that was looked at later: then there is no order.
            found = {rank: it and process.find(writers[rank]) for rank, it in found.items()}
            now = time.monotonic()
            for rank, it in found.items():
                if it is None:
                    self._died.setdefault(rank, now)
        return found

    def use(self, pids: Mapping[int, int]) -> tuple[dict[int, float], dict[int, float]]:
        """``cores`` and ``starved`` since the last call; both {} at the first, and when that was just now."""
        now, used = time.monotonic(), process.cpu_seconds(pids.values())
        passed_s, before = now - self._looked_at, self._used
        self._looked_at = now
        self._used = {rank: (used[pid], process.starved_seconds(pid)) for rank, pid in pids.items()}
        if passed_s < 0.1:
            return {}, {}
        shares = {
            rank: [round(max(0.0, this - last) / passed_s, 3) for this, last in zip(seconds, before[rank], strict=True)]
            for rank, seconds in self._used.items()
            if rank in before
        }
        return {rank: cores for rank, (cores, _) in shares.items()}, {
            rank: share for rank, (_, share) in shares.items()
        }

    def is_here(self, who: Identity) -> bool:
        """Whether the writer of a witness runs, or ran, on this host."""
        return (who.boot_id, who.hostname) == (self._here.boot_id, self._here.hostname)

    def _lock_holders(self, witnesses: Mapping[int, Witness]) -> dict[int, tuple[str, int]]:
        waiting: dict[str, dict[int, int]] = {}  # lock -> rank -> pid
        for rank, witness in witnesses.items():
            if witness.last is not None and witness.last.kind == Kind.LOCK_WAIT and self.is_here(witness.who):
                waiting.setdefault(witness.text(witness.last.sig), {})[rank] = witness.who.pid
        ranks = {witness.who.pid for witness in witnesses.values() if self.is_here(witness.who)}
        holders: dict[int, tuple[str, int]] = {}
        now = time.monotonic()
        for name, waiters in waiting.items():
            pid = locks.holder(name, [*waiters.values(), os.getpid()])
            since = self._unheld_since.setdefault(name, now)
            if pid != locks.NOBODY:
                del self._unheld_since[name]
            if pid > 0:
                pid = next((ancestor for ancestor in process.with_ancestors(pid) if ancestor in ranks), pid)
            if pid > 0 or (pid == locks.NOBODY and now - since >= self._patience_s):
                holders.update(dict.fromkeys(waiters, (name, pid)))
        return holders
