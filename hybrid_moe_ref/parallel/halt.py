"""How the ranks stop together: one rank publishes an error, and all ranks raise it.

    Halt           publishes the first error in the store, where every rank finds it
    Watchdog       detects, while a rank waits, that a peer's process has ended or that a collective exceeds its limit
    wait_or_halt   waits for a collective, and asks Halt and Watchdog at the same time

A killed rank reports nothing, and what the other ranks notice depends on the backend. NCCL waits for ever. gloo fails
only on the ranks that were communicating with the dead rank. So each rank publishes its process id in the store, and
while it waits, it checks whether the processes of the other ranks exist. This check is exact: a slow or suspended rank
does not count as dead. Ranks on other hosts, or in containers whose processes are not visible, are not checked.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from hybrid_moe_ref.parallel.observer import Collective

_HALT = "halt"

LOOK_UP_INTERVAL = timedelta(milliseconds=100)
"""Interval at which a waiting rank checks whether another rank has stopped the job."""

PATIENCE_S = 1.0
"""Seconds that a rank whose connection broke searches for a dead peer before it reports its own failure."""


class Stopped(RuntimeError):
    """An error that stops every rank. All ranks raise it with the same type and message."""


class ScheduleMismatch(Stopped):
    """The ranks' schedules differ, or a rank departs from its own schedule.

    The error is raised where the ranks would hang otherwise, and its message names the difference.
    """


class PeerLost(Stopped):
    """The process of a rank has ended, so the collectives that need this rank will never complete."""


class CollectiveStalled(Stopped):
    """A collective did not complete within the configured limit (engine.collective_limit_s)."""


class Halt:
    """Stops all ranks: every rank reads and raises the first error that a rank publishes in the store.

    store: the store that all ranks of the job share; None for a single rank, which publishes nothing
    """

    def __init__(self, store: dist.Store | None) -> None:
        self._store = store

    def publish(self, error: Stopped) -> Stopped:
        """Publish an error, so that all ranks stop. Returns the error that was published first; raise this error."""
        if self._store is None:
            return error
        text = f"{type(error).__name__}\n{error}"
        return _error(self._store.compare_set(_HALT, "", text).decode())

    def published(self) -> Stopped | None:
        """Return the error that a rank published; None while no rank has published one."""
        if self._store is None or not self._store.check([_HALT]):
            return None
        return _error(self._store.get(_HALT).decode())


def _error(text: str) -> Stopped:
    name, _, message = text.partition("\n")
    return {kind.__name__: kind for kind in (ScheduleMismatch, PeerLost, CollectiveStalled)}[name](message)


class RollCall:
    """Checks whether the processes of the other ranks on this host still exist.

    Outside Linux this is not possible, and :meth:`lost` always returns an empty list.
    """

    def __init__(self, rank: int, members: Sequence[int], store: dist.Store) -> None:
        self._store = dist.PrefixStore("roll_call", store)
        self._here = _host()
        self._unknown = set(members) - {rank}
        self._processes: dict[int, tuple[int, int]] = {}
        pid = os.getpid()
        self._store.set(str(rank), f"{self._here} {pid} {_start_ticks(pid)}")

    def lost(self) -> list[int]:
        """Return the ranks whose process has ended."""
        for rank in [rank for rank in self._unknown if self._store.check([str(rank)])]:
            host, pid, ticks = self._store.get(str(rank)).decode().rsplit(" ", 2)
            self._unknown.discard(rank)
            if host == self._here and int(ticks):
                self._processes[rank] = int(pid), int(ticks)
        return [rank for rank, (pid, ticks) in sorted(self._processes.items()) if _start_ticks(pid) != ticks]

    def pid(self, rank: int) -> int:
        """Return the process id of ``rank``, which must be one of the ranks that `lost` returned."""
        return self._processes[rank][0]


class Watchdog:
    """Decides, on one rank, whether the rank should give up waiting for a collective.

    roll_call  the processes of the other ranks; None if these processes are not checked
    limit_s    longest time in seconds for one collective; 0 if there is no limit
    """

    def __init__(self, rank: int, halt: Halt) -> None:
        self._rank = rank
        self._halt = halt
        self._event: Collective | None = None
        self._entered_s = 0.0
        self.roll_call: RollCall | None = None
        self.limit_s = 0.0

    def entered(self, event: Collective) -> None:
        """Note that the rank is about to issue this collective: its waiting time counts from now."""
        self._event, self._entered_s = event, time.monotonic()

    def reason(self) -> Stopped | None:
        """Return why a collective failed on this rank: another rank has died or has stopped the job; None if unknown.

        Waits up to PATIENCE_S seconds for a reason. For example, when a rank dies, the collective fails shortly before
        the other ranks can see that its process has ended.
        """
        deadline = time.monotonic() + (PATIENCE_S if self.roll_call else 0)
        while True:
            if error := self._halt.published() or self.error():
                return error
            if time.monotonic() > deadline:
                return None
            time.sleep(PATIENCE_S / 50)

    def error(self) -> Stopped | None:
        """Return the reason to stop waiting, and publish it to all ranks; None if there is no reason."""
        finding = self.finding()
        return self._halt.publish(finding) if finding else None

    def finding(self) -> Stopped | None:
        """Return the reason to stop waiting, without publishing it; None if there is no reason."""
        for rank in self.roll_call.lost() if self.roll_call else ():
            assert self.roll_call is not None
            return PeerLost(f"rank {rank} was lost: its process {self.roll_call.pid(rank)} has ended")
        waited_s = time.monotonic() - self._entered_s
        if self.limit_s and waited_s > self.limit_s and self._event is not None:
            what = f"{self._event.group} {self._event.op} of {self._event.layer}"
            message = f"rank {self._rank} has waited {waited_s:.1f} s in {what}; the limit is {self.limit_s:g} s"
            return CollectiveStalled(message)
        return None


def wait_or_halt(work: dist.Work, halt: Halt, watchdog: Watchdog | None = None) -> None:
    """Wait for the collective ``work``, and check every LOOK_UP_INTERVAL whether it can still complete.

    Raises the error of the collective itself, or the error that one of these two objects gives:

    halt       knows whether a rank stopped the job, and with which error
    watchdog   knows whether another rank has died, and whether the collective takes too long; None: not checked
    """
    while True:
        try:
            work.wait(LOOK_UP_INTERVAL)
            return
        except RuntimeError:
            if work.is_completed():
                _finish(work, halt, watchdog)  # the collective has ended in the meantime, with or without an error
                return
        if error := halt.published():
            raise error
        if watchdog and watchdog.finding():
            # The peer may have exited because it had finished all its work, including this collective, since the last
            # check.
            with contextlib.suppress(RuntimeError):
                work.wait(LOOK_UP_INTERVAL)
            if work.is_completed():
                _finish(work, halt, watchdog)
                return
            if error := watchdog.error():
                raise error


def _finish(work: dist.Work, halt: Halt, watchdog: Watchdog | None) -> None:
    """If the collective of ``work`` has failed, raise its error.

    If it failed because another rank stopped the job or died, raise the error that says so, instead of the backend's
    error.
    """
    try:
        work.wait()
    except RuntimeError as failure:
        if error := halt.published() or (watchdog and watchdog.reason()):
            raise error from failure
        raise


def _start_ticks(pid: int) -> int:
    """Return the start time of a process in clock ticks since boot; 0 if the process has ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _host() -> str:
    """Return an identifier that is equal for two processes that can see each other's process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
