"""Detect, while a rank waits, that a peer's process has ended or that a collective exceeds its time limit.

A killed rank reports nothing, and its peers depend on the backend: NCCL waits for ever; gloo fails only on the ranks
that were communicating with it. So each rank publishes its process id in the store, and checks while it waits whether
the processes of the others exist. This is exact: a slow or stopped rank is not taken for dead. Ranks on other hosts, or
in containers whose processes are not visible, are not checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from hybrid_moe_ref.parallel.guard import CollectiveStalled, Halt, PeerLost, Stopped
from hybrid_moe_ref.parallel.observer import Collective

PATIENCE_S = 1.0
"""How long a rank whose connection broke looks for a dead peer before it reports its own failure."""


class RollCall:
    """The processes of the other ranks on this host. Works on Linux; elsewhere no rank is ever reported lost."""

    def __init__(self, rank: int, members: Sequence[int], store: dist.Store) -> None:
        self._store = dist.PrefixStore("roll_call", store)
        self._here = _host()
        self._unknown = set(members) - {rank}
        self._processes: dict[int, tuple[int, int]] = {}
        pid = os.getpid()
        self._store.set(str(rank), f"{self._here} {pid} {_start_ticks(pid)}")

    def lost(self) -> list[int]:
        """The ranks whose process has ended."""
        for rank in [rank for rank in self._unknown if self._store.check([str(rank)])]:
            host, pid, ticks = self._store.get(str(rank)).decode().rsplit(" ", 2)
            self._unknown.discard(rank)
            if host == self._here and int(ticks):
                self._processes[rank] = int(pid), int(ticks)
        return [rank for rank, (pid, ticks) in sorted(self._processes.items()) if _start_ticks(pid) != ticks]

    def pid(self, rank: int) -> int:
        """The process id of a rank on this host that has published it."""
        return self._processes[rank][0]


class Watchdog:
    """Decides for one rank whether waiting on is useless.

    roll_call  the processes of the other ranks; None: not checked
    limit_s    how long one collective may take; 0: no limit
    """

    def __init__(self, rank: int, halt: Halt) -> None:
        self._rank = rank
        self._halt = halt
        self._event: Collective | None = None
        self._entered_s = 0.0
        self.roll_call: RollCall | None = None
        self.limit_s = 0.0

    def entered(self, event: Collective) -> None:
        """Called when the rank is about to issue this collective."""
        self._event, self._entered_s = event, time.monotonic()

    def reason(self) -> Stopped | None:
        """Why a collective failed on this rank: a dead peer or a stopped job; None for another reason.

        Waits up to PATIENCE_S, because the operating system closes the connections of a process shortly before the
        process is seen to have ended.
        """
        deadline = time.monotonic() + (PATIENCE_S if self.roll_call else 0)
        while True:
            if error := self._halt.published() or self.error():
                return error
            if time.monotonic() > deadline:
                return None
            time.sleep(PATIENCE_S / 50)

    def error(self) -> Stopped | None:
        """Why waiting on is useless, or None. Publishes the error to all ranks."""
        finding = self.finding()
        return self._halt.publish(finding) if finding else None

    def finding(self) -> Stopped | None:
        """Why waiting on is useless, or None. Does not publish the error."""
        for rank in self.roll_call.lost() if self.roll_call else ():
            assert self.roll_call is not None
            return PeerLost(f"rank {rank} is gone: its process {self.roll_call.pid(rank)} has ended")
        waited_s = time.monotonic() - self._entered_s
        if self.limit_s and waited_s > self.limit_s and self._event is not None:
            what = f"{self._event.group} {self._event.op} of {self._event.layer}"
            message = f"rank {self._rank} has waited {waited_s:.1f} s in {what}; the limit is {self.limit_s:g} s"
            return CollectiveStalled(message)
        return None


def _start_ticks(pid: int) -> int:
    """The start time of a process, in clock ticks since boot; 0 if it has ended, even if it is not reaped yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _host() -> str:
    """An identifier that is equal for two processes that can see each other's process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
