"""Record the torch.distributed collectives of code that knows nothing of this project, inside one ``with``.

Works by exchanging the functions wherever a loaded module holds them, also under ``from torch.distributed import
all_reduce``. Not seen: collectives that do not go through torch.distributed's Python functions (a library's own NCCL
calls), point-to-point transfers, functional collectives inside torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from hybrid_moe_ref.parallel.observer import Collective
from repro.record import Recorder
from repro.verdict.result import list_ranks

WATCHED = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single", "all_to_all", "all_to_all_single", "broadcast", "reduce",
    "gather", "scatter", "barrier",
)  # fmt: skip
_LISTS = {"all_gather": "tensor_list", "reduce_scatter": "input_list"}
_TENSORS = ("tensor", "input_tensor", "input", "output_tensor", "output")


class _Watched:
    """A collective in flight: the rank is seen to wait only in ``wait``."""

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
    """Record every collective of this process in the block; ``name`` stands where a server names its layer."""
    known: dict[Any, str] = {}
    depth = [0]
    originals = {name: getattr(dist, name) for name in WATCHED if hasattr(dist, name)}
    replaced = {
        id(original): (original, _recorded(op, original, recorder, name, known, depth))
        for op, original in originals.items()
    }
    changed: list[tuple[Any, str, Any]] = []
    for module in list(sys.modules.values()):
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in replaced and value is replaced[id(value)][0] and module is not sys.modules[__name__]:
                changed.append((module, attribute, value))
                setattr(module, attribute, replaced[id(value)][1])
    try:
        yield
    finally:
        for module, attribute, value in changed:
            setattr(module, attribute, value)


def _recorded(op: str, original: Any, recorder: Recorder, layer: str, known: dict[Any, str], depth: list[int]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **options: Any) -> Any:
        if depth[0]:  # one collective made of others is one
            return original(*args, **options)
        given = signature.bind(*args, **options)
        given.apply_defaults()
        if given.arguments.get("group") == dist.GroupMember.NON_GROUP_MEMBER:
            return original(*args, **options)  # nothing is issued by who is no member
        collective = describe(op, given.arguments, layer, recorder, known)
        depth[0] += 1
        try:
            if given.arguments.get("async_op"):
                ticket = recorder.issue(collective)
                work = original(*args, **options)
                if work is None:
                    return None
                return _Watched(
                    work, lambda: recorder.wait(collective, ticket), lambda: recorder.finish(collective, ticket)
                )
            recorder.enter(collective)
            result = original(*args, **options)
            recorder.leave(collective)
            return result
        finally:
            depth[0] -= 1

    return call


def describe(op: str, arguments: dict[str, Any], layer: str, recorder: Recorder, known: dict[Any, str]) -> Collective:
    """What must be equal on all ranks of a call: sizes only where the ranks have to agree on them."""
    group = arguments.get("group")
    name = known.get(group)
    if name is None:
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        name = known[group] = _name_group(group, members)
        recorder.groups({name: members})
    sizes: tuple[int, ...] = ()
    tensor = next((it for key in _TENSORS if isinstance(it := arguments.get(key), torch.Tensor)), None)
    if op in _LISTS:
        sizes = tuple(part.numel() for part in arguments[_LISTS[op]])
    elif op in ("all_to_all_single", "all_to_all", "gather", "scatter", "barrier"):
        pass  # uneven is legal, and each rank knows its own part alone
    elif tensor is not None:
        sizes = (min(t.numel() for t in _tensors(arguments)),)
    root = arguments.get("src", arguments.get("dst"))
    given = arguments.get("op", "")
    reduce_op = str(getattr(given, "op", given)).rpartition(".")[2].lower()  # a ReduceOp, or one of its constants
    dtype = str(tensor.dtype).removeprefix("torch.") if tensor is not None else ""
    return Collective(name, op, layer, sizes, dtype, reduce_op, -1 if root is None else int(root))


def _tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The smaller of input and output is a rank's own part of a gather or a scatter, and equal on all."""
    return [it for key in _TENSORS if isinstance(it := arguments.get(key), torch.Tensor)]


def _name_group(group: Any, members: list[int]) -> str:
    """The same on all members, and another for each group of this process: groups may share a description, as those of
    one dimension of a mesh do."""
    if group is None or group is dist.group.WORLD:
        return "world"
    told = _described(group)
    if not told:
        return f"group{group.group_name}".replace(":", "_")
    name = told if len(members) == dist.get_world_size() else f"{told}[{list_ranks(members)}]"
    alike = [
        other
        for other in dist.distributed_c10d._world.pg_map
        if _described(other) == told and dist.get_process_group_ranks(other) == members
    ]
    place = alike.index(group) if group in alike else 0  # in the order of their making, which is that of all members
    return f"{name}.{place + 1}" if place else name


def _described(group: Any) -> str:
    told = str(getattr(group, "group_desc", "") or "").replace(":", "_")
    return "" if told == "undefined" else told
