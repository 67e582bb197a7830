"""Record the torch.distributed collectives of foreign code inside a ``with`` block.

The first block of a process replaces the functions in every loaded module that holds them, also those imported by
``from torch.distributed import all_reduce``. They stay replaced; outside of a block they only pass the call on.

Not recorded: collectives that do not go through torch.distributed's Python functions (a library's own NCCL calls),
point-to-point transfers, functional collectives inside torch.compile, and calls batched by a coalescing manager.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from hybrid_moe_ref.parallel.observer import Collective
from repro.trace.recorder import Recorder
from repro.verdict.result import list_ranks

WATCHED = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all", "all_to_all_single", "broadcast", "reduce",
    "gather", "scatter", "barrier", "monitored_barrier", "all_reduce_coalesced", "all_gather_coalesced",
)  # fmt: skip
_LISTS = {
    "all_gather": "tensor_list",
    "reduce_scatter": "input_list",
    "all_reduce_coalesced": "tensors",
    "all_gather_coalesced": "input_tensor_list",
}
"""The list argument of an operation whose tensor sizes must be equal on all ranks."""

_TENSORS = ("tensor", "input_tensor", "input", "output_tensor", "output")
_UNCOMPARED = ("all_to_all_single", "all_to_all", "gather", "scatter", "barrier", "monitored_barrier")
"""Operations in which sizes may differ by rank, and each rank knows only its own; their sizes are not compared."""


@dataclass
class _Block:
    """The ``with`` block that this process is in.

    inside   a recorded call is running. A collective that is implemented by others is recorded as one.
    """

    recorder: Recorder
    layer: str
    names: dict[Any, str] = field(default_factory=dict)  # of the groups seen so far
    inside: bool = False


_blocks: list[_Block] = []


class _Watched:
    """The handle of an asynchronous collective. The rank counts as waiting only inside ``wait``."""

    def __init__(self, work: Any, wait: Callable[[], None], finish: Callable[[], None]) -> None:
        self._work, self._wait, self._finish = work, wait, finish

    def wait(self, *args: Any, **options: Any) -> Any:
        self._wait()
        done = self._work.wait(*args, **options)
        self._finish()
        return done

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@contextlib.contextmanager
def watched(recorder: Recorder, name: str = "") -> Iterator[None]:
    """Record every collective of this process in the block. name: recorded as the layer of its collectives."""
    _replace_functions()
    _blocks.append(_Block(recorder, name))
    try:
        yield
    finally:
        _blocks.pop()


@functools.cache
def _replace_functions() -> None:
    """Replace the functions, once: a module loaded later gets the replaced ones from torch.distributed itself."""
    originals = {name: getattr(dist, name) for name in WATCHED if hasattr(dist, name)}
    replaced = {id(original): (original, _recorded(op, original)) for op, original in originals.items()}
    for module in list(sys.modules.values()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in replaced and value is replaced[id(value)][0] and module is not sys.modules[__name__]:
                setattr(module, attribute, replaced[id(value)][1])


def _recorded(op: str, original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        if not _blocks or _blocks[-1].inside:
            return original(*args, **options)
        block = _blocks[-1]
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if bound.arguments.get("group") == dist.GroupMember.NON_GROUP_MEMBER:
            return original(*args, **options)  # a rank outside of the group issues nothing
        collective = describe(op, bound.arguments, block.layer, block.recorder, block.names)
        block.inside = True
        try:
            if bound.arguments.get("async_op"):
                return _issue(block.recorder, collective, lambda: original(*args, **options))
            block.recorder.enter(collective)
            result = original(*args, **options)
            block.recorder.leave(collective)
            return result
        finally:
            block.inside = False

    return call


def _issue(recorder: Recorder, collective: Collective, start: Callable[[], Any]) -> Any:
    ticket = recorder.issue(collective)
    work = start()
    if work is None:
        return None
    return _Watched(work, lambda: recorder.wait(collective, ticket), lambda: recorder.finish(collective, ticket))


def describe(op: str, arguments: dict[str, Any], layer: str, recorder: Recorder, names: dict[Any, str]) -> Collective:
    """The properties of a call that must be equal on all ranks. It has sizes only if those must be equal too.

    arguments: the call's arguments by name
    names: the names of the groups seen so far; a new group is added and recorded
    """
    group = arguments.get("group")
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    name = names.get(group)
    if name is None:
        name = names[group] = _name_group(group, members)
        recorder.groups({name: members})
    sizes: tuple[int, ...] = ()
    tensor = next((part for key in _TENSORS if isinstance(part := arguments.get(key), torch.Tensor)), None)
    if op in _LISTS:
        parts = arguments[_LISTS[op]]
        sizes = tuple(sum(t.numel() for t in part) if isinstance(part, list) else part.numel() for part in parts)
        tensor = tensor if tensor is not None or not parts else parts[0]
    elif op not in _UNCOMPARED and tensor is not None:
        sizes = (min(t.numel() for t in _tensors(arguments)),)
    reduction = arguments.get("op", "")  # a ReduceOp, or one of its constants
    reduce_op = str(getattr(reduction, "op", reduction)).rpartition(".")[2].lower()
    dtype = str(tensor.dtype).removeprefix("torch.") if isinstance(tensor, torch.Tensor) else ""
    return Collective(name, op, layer, sizes, dtype, reduce_op, _root(op, arguments, members))


def _root(op: str, arguments: dict[str, Any], members: list[int]) -> int:
    """The global rank of the root, which the call may give as a global or a group rank; -1 without a root."""
    for name in ("src", "dst"):
        if arguments.get(name) is not None:
            return int(arguments[name])
        if arguments.get(f"group_{name}") is not None:
            return members[int(arguments[f"group_{name}"])]
    return members[0] if op in ("gather", "scatter") else -1


def _tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Input and output of a call. The smaller is the rank's own part of a gather or scatter, equal on all ranks."""
    return [part for key in _TENSORS if isinstance(part := arguments.get(key), torch.Tensor)]


def _name_group(group: Any, members: list[int]) -> str:
    """A name for the group: the same on all its members, and unique in this process.

    Groups may share a description, for example the groups of one dimension of a device mesh.
    """
    if group is None or group is dist.group.WORLD:
        return "world"
    description = _described(group)
    if not description:
        return f"group{group.group_name}".replace(":", "_")
    everyone = len(members) == dist.get_world_size()
    name = description if everyone else f"{description}[{list_ranks(members)}]"
    alike = [
        other
        for other in dist.distributed_c10d._world.pg_map
        if _described(other) == description and dist.get_process_group_ranks(other) == members
    ]
    index = alike.index(group) if group in alike else 0  # in order of creation, which is the same on all members
    return f"{name}.{index + 1}" if index else name


def _described(group: Any) -> str:
    description = str(getattr(group, "group_desc", "") or "").replace(":", "_")
    return "" if description == "undefined" else description
