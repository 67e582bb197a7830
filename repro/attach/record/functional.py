"""Record functional collectives: the operators of torch.ops._c10d_functional, which DTensor and torch.compile use.

torch.compile puts these operators into its graphs, and the compiled code calls the same Python objects. Hooks replace
the functions that these objects call, so the compiler sees the same operators and makes the same graphs. The kernels of
torch's dispatcher are not replaced, because two threads could then wait for each other for ever: torch calls a kernel
in Python with the interpreter's lock held, and the kernel waits for the mutex of gloo's queue. A gloo thread can hold
this mutex while it waits for the interpreter's lock.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import collectives
from repro.attach.record import rank as this
from repro.attach.record.groups import group_of
from repro.attach.record.methods import dtype_of

OPERATORS = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce_coalesced",
    "all_reduce_coalesced_": "all_reduce_coalesced",
    "all_gather_into_tensor": "all_gather_into_tensor",
    "all_gather_into_tensor_out": "all_gather_into_tensor",
    "all_gather_into_tensor_coalesced": "all_gather_into_tensor_coalesced",
    "reduce_scatter_tensor": "reduce_scatter_tensor",
    "reduce_scatter_tensor_out": "reduce_scatter_tensor",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "all_to_all_single",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
}
"""Operator of torch.ops._c10d_functional -> name of the collective that it issues."""

_waiting: dict[int, tuple[Collective, int]] = {}  # address of a result's storage -> the result's collective and ticket


def hook(module: ModuleType) -> None:
    """Replace the Python functions that operators of torch.ops call: those in `OPERATORS`, and wait_tensor.

    Each function is replaced by an object that records the call and then calls the original function.

    module: torch.distributed._functional_collectives, which defines the operators. The import hook calls `hook` when
    this module is imported
    """
    import torch

    for namespace in ("_c10d_functional", "_c10d_functional_autograd"):
        operators = getattr(torch.ops, namespace)
        for name, op in OPERATORS.items():
            if hasattr(operators, name):
                _replace(getattr(operators, name), _Issue, op)
    _replace(torch.ops._c10d_functional.wait_tensor, _Wait, "")


def _replace(packet: Any, kind: Any, op: str) -> None:
    """Replace the function that an operator calls, and the function that its default overload calls.

    packet  the operator
    kind    _Issue or _Wait. Each function is replaced by an object of this class: ``kind(function, op)``
    op      name of the collective that the operator issues; "" for _Wait
    """
    for operator in (packet, packet.default):
        operator._op = kind(operator._op, op)


class _Operator:
    """An object that replaces the function that an operator calls.

    The object is equal to the function and has the same hash. So code that looks the function up in a dictionary can
    look up the object instead.
    """

    def __init__(self, original: Any, op: str) -> None:
        import torch

        self._original, self._op_name = original, op
        self._plain = (torch.Tensor, torch.nn.Parameter)

    def __hash__(self) -> int:
        return hash(self._original)

    def __eq__(self, other: object) -> bool:
        return self is other or self._original == other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def _rank(self, tensors: Any) -> Any:
        """Return the rank that records this call of an operator; None if the call is not recorded.

        A call is not recorded in these cases:

        - this process is no rank
        - the call is part of a recorded call
        - the tensor belongs to a subclass of torch.Tensor, or a TorchDispatchMode is active: if the operator really
          runs, torch calls it again, and that call is recorded
        - torch.compile traces the call

        tensors: the operator's first argument, a tensor or a list of tensors
        """
        first = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else tensors
        if this.current is None or collectives.inside() or type(first) not in self._plain:
            return None
        import torch

        return None if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling() else this.current


class _Issue(_Operator):
    """An object that replaces an operator's function, to record the collective that the operator issues.

    The collective counts as completed when the operator wait_tensor has returned for the collective's result.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        rank = self._rank(args[0] if args else None)
        read = _read(rank, self._op_name, args) if rank is not None else None
        if read is None:
            return self._original(*args, **options)
        ticket = collectives.issued(rank, read)
        with collectives.beneath():
            result = self._original(*args, **options)
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            _waiting[tensor.untyped_storage()._cdata] = (read, ticket)
        return result


class _Wait(_Operator):
    def __call__(self, *args: Any, **options: Any) -> Any:
        rank = self._rank(args[0] if args else None)
        entry = _waiting.pop(args[0].untyped_storage()._cdata, None) if rank is not None else None
        if entry is None:
            return self._original(*args, **options)
        with rank.lock:
            rank.recorder.wait(*entry)
        result = self._original(*args, **options)
        with rank.lock:
            rank.recorder.leave(*entry)
        return result


def _read(rank: Any, op: str, args: tuple[Any, ...]) -> Collective | None:
    """Return the collective of a call, from the operator's arguments.

    The last argument that is a string is the name of the group. If there are several strings, the first one is the
    reduction. If the arguments cannot be read, prints the reason, once for each ``op``, and returns None.

    op: the name of the collective; args: the arguments of the call
    """
    try:
        from torch.distributed.distributed_c10d import _resolve_process_group

        names: list[Any] = [arg for arg in args if isinstance(arg, str)]
        group = group_of(rank, _resolve_process_group(names[-1]))
        reduction = names[0].lower() if len(names) > 1 else ""
        tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        sizes = () if op == "all_to_all_single" else tuple(tensor.numel() for tensor in tensors)
        if op.startswith("reduce_scatter"):
            sizes = tuple(size // len(group.members) for size in sizes)
        root = group.members[args[1]] if op == "broadcast" else -1
        return Collective(group.name, op, rank.local.layer, sizes, dtype_of(tensors), reduction, root)
    except Exception as error:
        collectives.say_once(rank, op, error)
        return None
