"""The groups of ranks that a layout has: their members, and their process groups."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from hybrid_moe_ref.config import ParallelConfig

ON_CPU = ("dp", "world")
"""The groups that are always on the CPU (gloo), because their collectives carry only a few integers and must not wait
for a device."""


def group_members(parallel: ParallelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """Return, for the name of each group to which ``rank`` belongs, the global ranks of the group.

    dp     the ranks with the same tp_rank, which have different requests
    ep     all ranks
    tp     the ranks that run the same tokens; only if tp_size > 1
    world  all ranks; only if tp_size > 1

    Ranks are numbered dp-major: rank = dp_rank * tp_size + tp_rank.
    """
    num_ranks = parallel.world_size
    tp_rank = rank % parallel.tp_size
    groups = {
        "dp": tuple(range(tp_rank, num_ranks, parallel.tp_size)),
        "ep": tuple(range(num_ranks)),
    }
    if parallel.tp_size > 1:
        groups["tp"] = tuple(range(rank - tp_rank, rank - tp_rank + parallel.tp_size))
        groups["world"] = groups["ep"]
    return groups


class RankGroups:
    """The names and members of the groups of one rank. To cut a model to one rank's part needs only these."""

    def __init__(self, rank: int, members: Mapping[str, tuple[int, ...]]) -> None:
        self.rank = rank
        self._members = members

    def members(self, group: str) -> tuple[int, ...]:
        """Return the global ranks of ``group``, in group order."""
        return self._members[group]

    def group_rank(self, group: str) -> int:
        """Return this rank's index in ``group``."""
        return self._members[group].index(self.rank)

    @property
    def everyone(self) -> str:
        """Return the name of the gloo group that has all ranks: "world", or "dp" if tp_size is 1."""
        return "world" if "world" in self._members else "dp"


def create_groups(
    parallel: ParallelConfig, rank: int, backend: str, store: dist.Store, timeout: timedelta
) -> dict[str, dist.ProcessGroup]:
    """Join the job, and create the process groups of all ranks. Returns the groups of this rank.

    All ranks create all groups in the same order, as torch requires. So a rank also takes part in creating groups to
    which it does not belong.

    backend: torch.distributed's backend of the groups on the device, such as "nccl"; the groups in ON_CPU use gloo
    store: the store through which the ranks find each other

    Raises the error of torch.distributed if a peer does not join within ``timeout``.
    """
    dist.init_process_group("gloo", store=store, rank=rank, world_size=parallel.world_size, timeout=timeout)
    every_group = dict.fromkeys(
        group for other in range(parallel.world_size) for group in group_members(parallel, other).items()
    )
    mine: dict[str, dist.ProcessGroup] = {}
    for name, members in every_group:
        group = dist.new_group(
            list(members), backend="gloo" if name in ON_CPU else backend, timeout=timeout, group_desc=name
        )
        if rank in members:
            mine[name] = group
    return mine
