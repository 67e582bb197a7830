"""The plug-in ``hmr_cpu_ep``, which adds expert parallelism to vLLM's CPU build. HMR_CPU_EP=1 switches the plug-in on.

In vLLM 0.20 to 0.33, the CpuCommunicator has no all_gatherv and no reduce_scatterv, and the fused MoE for CPUs uses
the global id of an expert where the expert's number on this rank (the local id) is needed. This plug-in adds the two
methods, and translates global ids into local ids. With the plug-in, ``--data-parallel-size 2 --enable-expert-parallel``
serves on a laptop. The plug-in is for tests, not for speed: gathers are padded, the reduce-scatter is an all-reduce.

The recorder (``hmr_record``) works without this plug-in.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any


def register() -> None:
    """If HMR_CPU_EP=1 and this is vLLM's CPU build, add expert parallelism to it.

    This is the entry point `hmr_cpu_ep`. vLLM calls it in each of its processes, possibly several times.
    """
    if os.environ.get("HMR_CPU_EP") != "1":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _install()


@functools.cache
def _install() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv
    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    except ImportError:  # vLLM 0.20
        from vllm.model_executor.layers.fused_moe.cpu_fused_moe import CPUFusedMOE

        CPUFusedMOE.forward_torch = forward_of_local_experts
        CPUFusedMOE.forward_grouped_gemm = with_local_ids_of_layer(CPUFusedMOE.forward_grouped_gemm)
    else:
        CPUUnquantizedExperts.apply = with_local_ids(CPUUnquantizedExperts.apply)


def all_gatherv(communicator: Any, input_: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """Gather tensors that can have a different number of rows on each rank.

    input_  this rank's tensor, or a list of tensors, each [rows of this rank, …]
    dim     must be 0, else NotImplementedError is raised
    sizes   the number of rows of each rank of the group; None if all ranks have equally many

    Returns a tensor [rows of all ranks, …] in the order of the ranks; a list of these for a list of tensors.
    """
    import torch

    if dim != 0:
        raise NotImplementedError(f"all_gatherv on a CPU supports only dim=0, not dim={dim}")
    tensors = input_ if isinstance(input_, (list, tuple)) else [input_]
    rows = list(sizes) if sizes is not None else [tensors[0].shape[0]] * communicator.world_size
    gathered = []
    for tensor in tensors:
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(parts, padded, group=communicator.device_group)
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)]))
    return gathered if isinstance(input_, (list, tuple)) else gathered[0]


def reduce_scatterv(communicator: Any, input_: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
    """Sum the tensors of all ranks; return those rows of the sum that belong to this rank.

    input_  a tensor [rows of all ranks, …] in the order of the ranks
    dim     must be the first dimension, else NotImplementedError is raised
    sizes   the number of rows of each rank of the group; None if all ranks have equally many
    """
    import torch

    if dim not in (0, -input_.dim()):
        raise NotImplementedError(f"reduce_scatterv on a CPU supports only dim=0, not dim={dim}")
    world_size, rank = communicator.world_size, communicator.rank_in_group
    rows = list(sizes) if sizes is not None else [input_.shape[0] // world_size] * world_size
    total = input_.clone()
    torch.distributed.all_reduce(total, group=communicator.device_group)
    begin = sum(rows[:rank])
    return total[begin : begin + rows[rank]].contiguous()


def with_local_ids(original: Any) -> Any:
    """Wrap ``apply`` of vLLM's experts for CPUs, so that it accepts global expert ids.

    Experts of other ranks get the weight 0.
    """

    @functools.wraps(original)
    def apply(
        self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any,
        activation: Any, global_num_experts: int, expert_map: Any, *rest: Any, **options: Any,
    ) -> None:  # fmt: skip
        weights, ids = local_experts(topk_weights, topk_ids, expert_map)
        original(
            self, output, hidden_states, w1, w2, weights, ids, activation, global_num_experts, expert_map,
            *rest, **options,
        )  # fmt: skip

    return apply


def with_local_ids_of_layer(original: Any) -> Any:
    """Wrap ``forward_grouped_gemm`` of vLLM 0.20, so that it accepts global expert ids."""

    @functools.wraps(original)
    def forward(self: Any, layer: Any, input: Any, topk_weights: Any, topk_ids: Any, *rest: Any) -> Any:
        weights, ids = local_experts(topk_weights, topk_ids, layer.expert_map)
        return original(self, layer, input, weights, ids, *rest)

    return forward


def forward_of_local_experts(
    _: Any, layer: Any, input: Any, topk_weights: Any, topk_ids: Any, *rest: Any, **options: Any
) -> Any:
    """Compute this rank's experts, in place of ``forward_torch`` of vLLM 0.20.

    ``forward_torch`` would fail: the experts of other ranks have no local id, and ``forward_torch`` cannot skip them.

    layer         vLLM's MoE layer, which has the weights of this rank's experts; their activation is SiLU
    input         [tokens, hidden]
    topk_weights  [tokens, top_k], the weights of each token's experts
    topk_ids      [tokens, top_k], the global ids of these experts

    Returns the weighted sum of this rank's experts, [tokens, hidden].
    """
    import torch

    weights, ids = local_experts(topk_weights, topk_ids, layer.expert_map)
    output = torch.zeros(input.shape, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(layer.gate_up_linear, layer.down_linear, strict=True)):
        tokens, places = torch.nonzero((ids == expert) & (weights != 0), as_tuple=True)
        if len(tokens):
            gate, up = gate_up(input[tokens]).chunk(2, dim=-1)
            rows = down(torch.nn.functional.silu(gate) * up)
            output.index_add_(0, tokens, rows.float() * weights[tokens, places, None].float())
    return output.to(input.dtype)


def local_experts(weights: Any, ids: Any, expert_map: Any) -> tuple[Any, Any]:
    """Translate the global ids of each token's experts into local ids. Experts of other ranks get the weight 0.

    weights     [tokens, top_k], the weights of each token's experts
    ids         [tokens, top_k], the global ids of these experts
    expert_map  int [num_experts]: the local id of each expert, -1 for an expert of another rank; None without EP, where
                weights and ids are returned unchanged

    Returns the weights and the local ids, both [tokens, top_k].
    """
    if expert_map is None:
        return weights, ids
    local = expert_map[ids.long()]
    return weights.masked_fill(local < 0, 0.0), local.clamp(min=0).to(ids.dtype)
