"""Apply expert parallelism by all-gather and reduce-scatter (AG/RS) to an unchanged model.

Every rank holds ``num_experts / ep_size`` experts of each layer, and all other parameters. The experts of a layer run
between two collectives, as in vLLM's ``AgRsAll2AllManager``:

    C2 dispatch   all-gather-v of [hidden, topk_weights, topk_ids]: every rank receives the tokens of all ranks
       experts    every rank computes the contribution of its own experts to each token
    C3 combine    reduce-scatter-v: sum the contributions; each rank keeps its own tokens

Shape suffixes: N tokens of this rank, S tokens of all ranks, H hidden, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybrid_moe_ref.layers.moe import MoE
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter, ForwardContext, moe_layer_name
from hybrid_moe_ref.parallel.sharding.shares import experts_per_rank


def apply_expert_parallel(
    model: HybridMoE, comm: Communicator, backend: type[AllGatherReduceScatter] = AllGatherReduceScatter
) -> ForwardContext:
    """In every layer and draft layer, replace the experts by this rank's shard.

    If the model is on the meta device, no rank ever holds all experts.

    backend: the class of the hooks that exchange tokens before and after the experts (C2 and C3)

    Returns the context of the layers. Set its `sizes` before each forward pass: a tuple of the number of tokens of each
    dp rank in this step.

    Raises ConfigError if the experts cannot be divided evenly over the ranks.
    """
    per_rank = experts_per_rank(model.config.num_experts, len(comm.members("ep")))
    context = ForwardContext()

    def share(blocks: Iterable[Any]) -> tuple[ScheduleEntry, ...]:
        schedule: list[ScheduleEntry] = []
        for block in blocks:
            moe = block.mlp
            assert isinstance(moe, MoE)
            moe.experts = moe.experts.shard(comm.group_rank("ep") * per_rank, per_rank)
            schedule += backend(comm, context, moe_layer_name(block.name)).install(moe.experts)
        return tuple(schedule)

    context.schedule = share(model.blocks)
    context.draft_schedule = share(model.draft_blocks)
    return context
