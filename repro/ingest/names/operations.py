"""Translate the different names that tools have for one collective to one name."""

from __future__ import annotations

from functools import lru_cache

OPERATIONS = {
    "_all_gather_base": "all_gather", "all_gather_into_tensor": "all_gather", "all_gather_single": "all_gather",
    "allgather": "all_gather", "allgather_base": "all_gather", "allgatherv": "all_gather", "all_gatherv": "all_gather",
    "all_gather": "all_gather", "allgather_into_tensor_coalesced": "all_gather", "all_gather_object": "all_gather",
    "all_gather_tensor": "all_gather",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter", "reducescatter": "reduce_scatter", "reduce_scatter": "reduce_scatter",
    "reduce_scatterv": "reduce_scatter",
    "allreduce": "all_reduce", "all_reduce": "all_reduce", "all_reduce_barrier": "barrier", "barrier": "barrier",
    "monitored_barrier": "barrier",
    "broadcast": "broadcast", "_broadcast_oop": "broadcast", "broadcast_object_list": "broadcast",
    "reduce": "reduce", "_reduce_oop": "reduce",
    "alltoall": "all_to_all", "alltoall_base": "all_to_all", "alltoallv": "all_to_all",
    "all_to_all": "all_to_all", "all_to_all_single": "all_to_all",
    "gather": "gather", "gather_object": "gather", "scatter": "scatter", "scatter_object_list": "scatter",
    "send": "send", "isend": "send", "recv": "recv", "irecv": "recv", "recvanysource": "recv",
    "coalesced": "coalesced",
}  # fmt: skip


@lru_cache(maxsize=4096)
def operation(name: str) -> str:
    """Return torch.distributed's name of an operation: "nccl:_all_gather_base" and "ALLGATHER" -> "all_gather"."""
    bare = name.rpartition(":")[2].strip()
    lowered = bare.lower()
    known = OPERATIONS.get(lowered)
    if known is None and lowered.endswith("_coalesced"):
        known = OPERATIONS.get(lowered.removesuffix("_coalesced"))
    return known or OPERATIONS.get(lowered.lstrip("_"), lowered or "unknown")
