"""The methods of torch's process groups that issue a collective, and how to read the arguments of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Sizes = Callable[[Any, Any], tuple[int, ...]]


class Method(NamedTuple):
    """How to read the arguments of one method of ProcessGroup.

    op         name of the operation, as torch.distributed calls it
    sizes      returns the sizes that must be equal on all ranks, from the first two arguments of the call
    rooted     whether the options of the call name a root rank
    reduces    whether the options of the call name a reduction, such as SUM
    one_sided  whether the method is a send or a receive; its second argument is then the rank at the other end
    fast       whether the hooks in C can read the arguments; if not, the hooks in Python read them
    """

    op: str
    sizes: Sizes
    rooted: bool = False
    reduces: bool = False
    one_sided: bool = False
    fast: bool = True

    @property
    def compiled(self) -> tuple[int, bool] | None:
        """Return the number of the argument that has the sizes (1 or 2; 0 if none), and whether argument 1 has tensors.

        The hooks in C need these two values. Returns None if only the hooks in Python can read the arguments of the
        method.
        """
        sized = {_none: 0, _each: 1, _first: 1, _second: 2, _inputs: 2}.get(self.sizes)
        return None if sized is None or not self.fast else (sized, self.op != "barrier")


def _each(tensors: Any, _: Any) -> tuple[int, ...]:
    return (tensors.numel(),) if hasattr(tensors, "numel") else tuple([tensor.numel() for tensor in tensors])


def _first(tensor: Any, _: Any) -> tuple[int, ...]:
    return (tensor.numel(),)


def _second(_: Any, tensor: Any) -> tuple[int, ...]:
    return (tensor.numel(),)


def _inputs(_: Any, tensors: Any) -> tuple[int, ...]:
    return _each(tensors, None)


def _parts(_: Any, lists: Any) -> tuple[int, ...]:
    if hasattr(lists, "numel"):
        return (lists.numel(),)
    parts = lists[0] if lists and isinstance(lists[0], (list, tuple)) else lists
    return tuple([part.numel() for part in parts])


def _none(_: Any, __: Any) -> tuple[int, ...]:
    return ()  # the sizes may differ by rank, or each rank knows only its own size


METHODS = {
    "allreduce": Method("all_reduce", _each, reduces=True),
    "allreduce_coalesced": Method("all_reduce_coalesced", _each, reduces=True),
    "allgather": Method("all_gather", _inputs),
    "_allgather_base": Method("all_gather_into_tensor", _second),
    "all_gather_single": Method("all_gather_into_tensor", _second),
    "allgather_coalesced": Method("all_gather_coalesced", _inputs),
    "allgather_into_tensor_coalesced": Method("all_gather_into_tensor_coalesced", _inputs),
    "all_gather_single_coalesced": Method("all_gather_into_tensor_coalesced", _inputs),
    "reduce_scatter": Method("reduce_scatter", _parts, reduces=True),
    "_reduce_scatter_base": Method("reduce_scatter_tensor", _first, reduces=True),
    "reduce_scatter_single": Method("reduce_scatter_tensor", _first, reduces=True),
    "reduce_scatter_tensor_coalesced": Method("reduce_scatter_tensor_coalesced", _each, reduces=True),
    "reduce_scatter_single_coalesced": Method("reduce_scatter_tensor_coalesced", _each, reduces=True),
    "alltoall_base": Method("all_to_all_single", _none),
    "all_to_all_single": Method("all_to_all_single", _none),
    "alltoall": Method("all_to_all", _none),
    "broadcast": Method("broadcast", _each, rooted=True),
    "reduce": Method("reduce", _each, rooted=True, reduces=True),
    "gather": Method("gather", _none, rooted=True),
    "scatter": Method("scatter", _none, rooted=True),
    "barrier": Method("barrier", _none),
    "monitored_barrier": Method("monitored_barrier", _none, fast=False),
    "send": Method("send", _none, one_sided=True),
    "recv": Method("recv", _none, one_sided=True),
}

_dtypes: dict[Any, str] = {}
_reductions: dict[int, str] = {}


def dtype_of(tensors: Any) -> str:
    """Return the name of the dtype of a tensor, or of the first tensor of nested lists; "" if there is no tensor."""
    while isinstance(tensors, (list, tuple)):
        if not tensors:
            return ""
        tensors = tensors[0]
    dtype = getattr(tensors, "dtype", None)
    name = _dtypes.get(dtype)
    if name is None:
        name = _dtypes[dtype] = "" if dtype is None else str(dtype).removeprefix("torch.")
    return name


def reduction_of(opts: Any) -> str:
    """Return the name of a call's reduction, such as "max"; "sum" if the call names none.

    opts: the last argument of the call. Usually this is the object with the call's options; in older forms of a call
    it is the reduction itself, or an argument that has nothing to do with the reduction
    """
    reduction = getattr(opts, "reduceOp", None)
    if reduction is None:
        operation = getattr(opts, "op", opts)
        return str(operation).rpartition(".")[2].lower() if type(operation).__name__ == "RedOpType" else "sum"
    number = hash(reduction)  # of torch: the number of the operation
    name = _reductions.get(number)
    if name is None:
        name = _reductions[number] = str(reduction.op).rpartition(".")[2].lower()
    return name
