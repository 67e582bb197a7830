"""What a rank looks for while it waits: a peer that is gone, and, with a limit, a collective that does not end.

A rank that is killed says nothing, and what its peers see depends on the backend: NCCL waits, gloo tells those ranks
alone that were talking to it just then. So each rank leaves its process id in the store, and while it waits looks now
and then whether the others' processes exist. That is exact, and a slow or stopped rank raises no alarm. Ranks of other
hosts, or of containers that cannot see each other's processes, are not looked at.
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
"""How long a rank whose connection broke looks for the one that is gone, before it takes the failure for its own."""


class RollCall:
    """One rank's look at the others. Linux; elsewhere nobody is ever found missing."""

    def __init__(self, rank: int, members: Sequence[int], store: dist.Store) -> None:
        self._store = dist.PrefixStore("roll_call", store)
        self._here = _host()
        self._unknown = set(members) - {rank}
        self._processes: dict[int, tuple[int, int]] = {}
        pid = os.getpid()
        self._store.set(str(rank), f"{self._here} {pid} {_start_ticks(pid)}")

    def lost(self) -> list[int]:
        """Ranks whose process has ended."""
        for rank in [rank for rank in self._unknown if self._store.check([str(rank)])]:
            host, pid, ticks = self._store.get(str(rank)).decode().rsplit(" ", 2)
            self._unknown.discard(rank)
            if host == self._here and int(ticks):
                self._processes[rank] = int(pid), int(ticks)
        return [rank for rank, (pid, ticks) in sorted(self._processes.items()) if _start_ticks(pid) != ticks]

    def pid(self, rank: int) -> int:
        """The process id of a rank that was seen on this host."""
        return self._processes[rank][0]


class Watchdog:
    """Tells one rank when there is no use in waiting on.

    roll_call  who else lives; None: nobody is looked for
    limit_s    how long one collective may take; 0: as long as it takes
    """

    def __init__(self, rank: int, halt: Halt) -> None:
        self._rank = rank
        self._halt = halt
        self._event: Collective | None = None
        self._entered_s = 0.0
        self.roll_call: RollCall | None = None
        self.limit_s = 0.0

    def entered(self, event: Collective) -> None:
        """The rank is about to issue this collective."""
        self._event, self._entered_s = event, time.monotonic()

    def reason(self) -> Stopped | None:
        """Why a collective failed under this rank, if a peer is gone. The kernel closes the connections of a process
        a little before the process itself is seen to have ended.
        """
        deadline = time.monotonic() + (PATIENCE_S if self.roll_call else 0)
        while True:
            if error := self._halt.heard() or self.error():
                return error
            if time.monotonic() > deadline:
                return None
            time.sleep(PATIENCE_S / 50)

    def error(self) -> Stopped | None:
        """Why there is no use in waiting on, published to all ranks; or None."""
        finding = self.finding()
        return self._halt.tell(finding) if finding else None

    def finding(self) -> Stopped | None:
        """As `error`, but not published."""
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
    """When a process began, in clock ticks since boot; 0 when it is gone, also while nobody has reaped it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _host() -> str:
    """Equal for two processes that can see each other's process ids."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
