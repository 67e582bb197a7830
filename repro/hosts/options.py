"""The settings of a run that the watcher and the agents on other hosts need."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass


class _AllGroups(Collection[str]):
    """Acts as a set that contains every group name."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


ALL_GROUPS = _AllGroups()


@dataclass(frozen=True)
class WatchOptions:
    """The settings of a run that its watcher and its agents need.

    quiet_window_s  as soon as no rank has recorded an event for this many seconds, the ranks are judged
    deadline_s      after this many seconds the watch ends, with a verdict or without one
    queued_groups   the groups that use a device, such as NCCL's. A rank records a collective of such a group when the
                    rank queues the collective, not when the device runs it
    """

    num_ranks: int
    quiet_window_s: float
    deadline_s: float
    queued_groups: Collection[str] = ()
