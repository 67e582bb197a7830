"""Process groups: their names and members, and the record of their creation, which is a collective of all ranks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import rank as this
from repro.attach.record.imports import replace

NEW_GROUP = "new_group"
"""The name of a group of all ranks that exists only in the record.

Each creation of a process group is recorded as a collective of this group, because all ranks must create the same
process groups in the same order.
"""


class _Group(NamedTuple):
    """A process group: a weak reference to it, its name, its members, and whether it is on the host (CPU).

    If the group is on the host, the recorder is allowed to ask torch at any time whether a collective of the group is
    complete. If the group is on a device, this question would end the capture of a CUDA graph.
    """

    group: Any
    name: str
    members: list[int]
    on_host: bool


_known: dict[int, _Group] = {}  # id(group) -> group
_descriptions: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def describe(group: Any, description: str) -> None:
    """Set a description of a group, from which the recorder makes the group's name.

    Use this for a library that gives torch no description. Call this function before the group is first recorded; a
    later call has no effect.
    """
    if group is not None:
        _descriptions[group] = description


def hook(c10d: ModuleType) -> None:
    """Hook the collectives of process groups, and the functions that create and destroy the groups.

    If the environment variables RANK and WORLD_SIZE are set, also begin to record this process.

    c10d: torch.distributed.distributed_c10d
    """
    import torch._C._distributed_c10d as native

    from repro.attach.record import collectives

    collectives.hook(native)
    replace_function(c10d, "init_process_group", _joining)
    replace_function(c10d, "new_group", _creating)
    replace_function(c10d, "destroy_process_group", _leaving)
    this.become_from_environment()


def replace_function(c10d: ModuleType, name: str, make: Callable[..., Any]) -> None:
    """Replace the function ``name`` of c10d by ``make(original)``, where ``original`` is this function.

    If torch.distributed has imported the function from c10d, replace it there, too.

    c10d: torch.distributed.distributed_c10d
    """
    original = vars(c10d).get(name)
    replace(c10d, name, make)
    package = sys.modules.get(c10d.__name__.rpartition(".")[0])
    if package is not None and original is not None and vars(package).get(name) is original:
        setattr(package, name, vars(c10d)[name])


def _joining(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def init_process_group(*args: Any, **options: Any) -> Any:
        """Call torch's init_process_group, in which the ranks connect, and open the witness of this rank.

        If this process already knows its rank, open the witness before the call, so that the witness also shows a rank
        that waits for ever to connect. If not, open the witness after the call.
        """
        number, size = options.get("rank", -1), options.get("world_size", -1)
        method = options.get("init_method", args[1] if len(args) > 1 else None)
        meeting = method if isinstance(method, str) and not method.startswith("env:") else ""
        if isinstance(number, int) and isinstance(size, int) and 0 <= number < size:
            this.become(number, size, meeting)
        else:
            this.become_from_environment()
        if this.current is not None:
            this.current.phase("init_process_group")
        result = original(*args, **options)
        if this.current is None:
            dist = _dist()
            this.become(dist.get_rank(), dist.get_world_size(), meeting)
        if this.current is not None:
            this.current.phase("run")
        return result

    return init_process_group


def _creating(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def new_group(*args: Any, **options: Any) -> Any:
        rank = this.current
        if rank is None or options.get("use_local_synchronization"):
            return original(*args, **options)
        ranks = options.get("ranks", args[0] if args else None)
        label = "all ranks" if ranks is None else f"ranks {','.join(map(str, ranks))}"
        creation = Collective(NEW_GROUP, NEW_GROUP, label)
        with rank.lock:
            rank.recorder.enter(creation)
        group = original(*args, **options)
        with rank.lock:
            rank.recorder.leave(creation)
        return group

    return new_group


def _leaving(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def destroy_process_group(*args: Any, **options: Any) -> Any:
        if this.current is not None:
            this.current.phase("destroy_process_group")
        result = original(*args, **options)
        if this.current is not None:
            this.current.phase("after destroy_process_group")
        return result

    return destroy_process_group


def _dist() -> Any:
    import torch.distributed as dist

    return dist


def c10d_world() -> Any:
    """Return the object in which torch keeps its process groups, ``torch.distributed.distributed_c10d._world``."""
    return _dist().distributed_c10d._world


def dist_ranks(group: Any) -> list[int]:
    """Return the global ranks of a group, in group order."""
    ranks: list[int] = _dist().get_process_group_ranks(group)
    return ranks


def group_of(rank: this.Rank, group: Any) -> _Group:
    """Return the name and members of a group, and whether it is on the host (CPU).

    The first call for a group also records the name and the members.

    rank: the recorded rank of this process, in whose witness they are recorded
    group: a process group of torch, or one of its backends

    Raises LookupError if torch.distributed does not know the group.
    """
    known = _known.get(id(group))
    if known is not None and known.group() is group:
        return known
    found = _find(group)
    members = dist_ranks(found)
    name = name_group(found, members)
    on_host = str(c10d_world().pg_map[found][0]) in ("gloo", "mpi")
    known = _known[id(group)] = _Group(weakref.ref(group), name, members, on_host)
    if not on_host and rank.rank == members[0]:
        rank.note_device_group(name)
    with rank.lock:
        rank.recorder.groups({name: members})
    return known


def _find(group: Any) -> Any:
    """Return the process group to which an object belongs: the object is the group itself, or one of its backends.

    Raises LookupError if there is no such group.
    """
    import torch

    world = c10d_world().pg_map
    if group in world:
        return group
    for candidate in world:
        for device in candidate._device_types:
            if candidate._get_backend(torch.device(device)) is group:
                return candidate
    raise LookupError("this object is not a process group that torch.distributed knows")


def name_group(group: Any, members: list[int]) -> str:
    """Return a name for the group that is the same on all members and unique in this process.

    The name is the group's description (see `describe`; by default torch's attribute ``group_desc``) with the members
    of the group, because several groups can have the same description, for example the groups of one dimension of a
    device mesh. For a group of all ranks, the name is the description alone. If another group has the same description
    and members, a number follows.

    The default group is "world". A group without a description is "group" with torch's own name.
    """
    from repro.verdict.result import list_ranks

    dist = _dist()
    if group is None or group is dist.group.WORLD:
        return "world"
    description = _described(group)
    if not description:
        return f"group{group.group_name}".replace(":", "_")
    everyone = len(members) == dist.get_world_size()
    name = description if everyone else f"{description}[{list_ranks(members)}]"
    alike = [
        other for other in c10d_world().pg_map if _described(other) == description and dist_ranks(other) == members
    ]
    # groups with one description are numbered in the order of creation, which is equal on all members
    index = alike.index(group) if group in alike else 0
    return f"{name}.{index + 1}" if index else name


def _described(group: Any) -> str:
    description = _descriptions.get(group) or str(getattr(group, "group_desc", "") or "").replace(":", "_")
    return "" if description == "undefined" else description
