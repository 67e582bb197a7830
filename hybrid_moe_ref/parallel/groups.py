"""The groups of ranks that a layout has, and a rank's index in each of them. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hybrid_moe_ref.config import ParallelConfig


def group_members(parallel: ParallelConfig, rank: int) -> dict[str, tuple[int, ...]]:
    """The groups that ``rank`` belongs to, as name -> global ranks.

    "dp" has ranks with different requests, "ep" the ranks that share the experts. If tp_size > 1, "tp" has the ranks
    that run the same tokens, and "world" has all ranks. Ranks are numbered dp-major: rank = dp_rank * tp_size +
    tp_rank.
    """
    num_ranks = parallel.dp_size * parallel.tp_size
    tp_rank = rank % parallel.tp_size
    groups = {
        "dp": tuple(range(tp_rank, num_ranks, parallel.tp_size)),
        "ep": tuple(range(num_ranks)),
    }
    if parallel.tp_size > 1:
        groups["tp"] = tuple(range(rank - tp_rank, rank - tp_rank + parallel.tp_size))
        groups["world"] = groups["ep"]
    return groups


@dataclass(frozen=True)
class RankGroups:
    """The groups of one rank, as name -> global ranks. It is all that a layout needs of a `Communicator`."""

    groups: Mapping[str, tuple[int, ...]]
    rank: int

    def members(self, group: str) -> tuple[int, ...]:
        """Global ranks of ``group``, in group order."""
        return self.groups[group]

    def group_rank(self, group: str) -> int:
        """This rank's index in ``group``."""
        return self.groups[group].index(self.rank)
