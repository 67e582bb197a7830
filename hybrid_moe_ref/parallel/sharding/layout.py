"""Select how the model is split over the ranks of a ParallelConfig, and load one rank's part.

dp_size  tp_size  expert_parallel   attention, recurrence     routed experts
1        1        yes or no         are not split             are not split
N        1        no                are not split             are not split
N        1        yes               are not split             a rank has 1/N of them; C2 and C3 exchange tokens
1        N        no                a rank has 1/N of heads   a rank has 1/N of the intermediate size of each
1        N        yes               a rank has 1/N of heads   a rank has 1/N of them; no tokens are exchanged
D        N        yes               a rank has 1/N of heads   a rank has 1/(D N) of them; C2 and C3 exchange chunks
D        N        no                a rank has 1/N of heads   a rank has 1/N of the intermediate size of each

Ranks with different dp_rank have different requests. A chunk is the part of a tp group's tokens that one of its ranks
sends.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from hybrid_moe_ref.config import ModelConfig, ParallelConfig
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.groups import RankGroups, group_members
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter, ForwardContext, SumOverRanks
from hybrid_moe_ref.parallel.sharding.expert import apply_expert_parallel
from hybrid_moe_ref.parallel.sharding.shares import expert_sharing
from hybrid_moe_ref.parallel.sharding.tensor import apply_tensor_parallel


def apply_layout(
    model: HybridMoE,
    comm: Communicator,
    parallel: ParallelConfig,
    backend: type[AllGatherReduceScatter] = AllGatherReduceScatter,
    adder: type[SumOverRanks] = SumOverRanks,
) -> ForwardContext:
    """Reduce `model` to this rank's part.

    The model should be on the meta device, so that no rank ever holds the whole model.

    backend  the class of the hooks that exchange tokens before and after the experts (C2 and C3)
    adder    the class of the hook that sums the output of a module over the tp group

    Returns the context of the layers: it has the schedule of a forward pass, and gets the numbers of tokens of a step.

    Raises ConfigError for a size that cannot be divided over the ranks.
    """
    if parallel.tp_size > 1:
        return apply_tensor_parallel(model, comm, expert_sharing(parallel), backend, adder)
    if parallel.expert_parallel and model.config.num_experts:
        return apply_expert_parallel(model, comm, backend)
    return ForwardContext()


def sizes_of_a_rank(config: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype) -> HybridMoE:
    """Return rank 0's part of the model, on the meta device. On all other ranks, the part has the same sizes."""
    model = HybridMoE(config, device="meta", dtype=dtype)
    apply_layout(model, cast(Communicator, RankGroups(0, group_members(parallel, 0))), parallel)
    return model


def load_part(
    folder: str | Path,
    comm: Communicator,
    parallel: ParallelConfig,
    backend: type[AllGatherReduceScatter] = AllGatherReduceScatter,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[HybridMoE, ForwardContext]:
    """Load this rank's part of a checkpoint folder. Returns the model and the context of its layers.

    Rows of which this rank holds nothing are not read from the files.

    backend  the class of the hooks that exchange tokens before and after the experts (C2 and C3)
    dtype    dtype of the parameters; None: the dtype in which the checkpoint was saved
    """
    contexts: list[ForwardContext] = []

    def cut(whole: HybridMoE) -> None:
        contexts.append(apply_layout(whole, comm, parallel, backend))

    model = HybridMoE.from_pretrained(folder, dtype=dtype, device=device, cut=cut)
    return model, contexts[0]
