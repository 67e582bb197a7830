"""What the watcher, and its agent on each other host, have to know about a run."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass


class _AllGroups(Collection[str]):
    """Contains every group, whatever it is called."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


ALL_GROUPS = _AllGroups()


@dataclass(frozen=True)
class WatchOptions:
    """One run, as far as a watcher is concerned.

    quiet_window_s  how long nothing may happen on any rank before the ranks are judged, in seconds
    deadline_s      after how many seconds the watch ends, decided or not
    queued_groups   groups whose collectives the ranks record when they queue them, as on NCCL
    """

    num_ranks: int
    quiet_window_s: float
    deadline_s: float
    queued_groups: Collection[str] = ()
