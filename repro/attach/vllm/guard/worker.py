"""Hooks of a worker: it joins the vote when its groups exist, and its collectives are the entries of the guard."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from repro.attach.vllm.guard.ending.lookout import Lookout
from repro.attach.vllm.guard.ending.peers import Process
from repro.attach.vllm.guard.ending.stop import Refused, Stop
from repro.attach.vllm.guard.meeting import board, settings
from repro.attach.vllm.guard.meeting.meeting import Meeting, root_of
from repro.attach.vllm.guard.meeting.vote import decide
from repro.attach.vllm.guard.schedule.guard import Guard

DEADLINE_S = 60.0
"""Seconds that the ranks wait for each other in the start vote (HMR_GUARD_DEADLINE)."""

current: Guard | None = None
"""The guard of this process if it is a worker and all ranks agreed to be guarded, else None."""

lookout: Lookout | None = None
missing: list[str] = []
"""The hooks that this vLLM lacks and without which no rank can agree."""


class _Group(NamedTuple):
    """group: a weak reference; name; shared: whether it has ranks of several data-parallel ranks."""

    group: Any
    name: str
    shared: bool


_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_groups: dict[int, _Group] = {}
_ranks_per_engine = 1


def after_fork() -> None:
    """Reset the state in a forked child, which is not the worker."""
    global current, lookout
    current = lookout = None
    _groups.clear()


# -- start and end ---------------------------------------------------------------------------------------------------


def initialising(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.init_device, after which the groups exist."""

    @wraps(original)
    def init_device(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        if lookout is None:
            guarded(join, self.vllm_config)
        return result

    return init_device


def guarded(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function of ours. Only a refusal reaches the server."""
    try:
        return call(*args)
    except Refused:
        raise
    except Exception as error:
        print(f"repro guard: off in this process: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return None


def join(config: Any) -> None:
    """Take part in the start vote of all ranks. Raises Refused if they do not agree, in the mode ``agree``."""
    global current, lookout, _ranks_per_engine
    import torch.distributed as dist
    from vllm.distributed.parallel_state import get_dp_group

    rank, parallel = dist.get_rank(), config.parallel_config
    mode = os.environ.get("HMR_GUARD", "")
    stop = Stop(f"rank {rank}", mode == "agree")
    if int(parallel.data_parallel_size) < 2:
        stop.say("off: with one data-parallel rank there is no step agreement")
        return
    num_ranks, per_engine = dist.get_world_size(), int(parallel.world_size)
    if num_ranks != int(parallel.world_size_across_dp):
        raise_or_say(stop, "the ranks have no group of torch.distributed in common, as with --enable-elastic-ep")
        return
    store = dist.distributed_c10d._get_default_store()
    meeting, mine = Meeting.of(store), board.inherited()
    if rank == 0:
        meeting.prepare(range(num_ranks))
    if mine is not None:
        root = root_of(store)
        mine.meet_at(root.host, root.port)
    guard = Guard(rank, get_dp_group().ranks, meeting, stop, mine, num_ranks)
    expected = [f"worker of rank {other}" for other in range(num_ranks)]
    if mine is not None:
        expected += [
            f"{role} of rank {other}" for other in range(0, num_ranks, per_engine) for role in ("engine", "front end")
        ]
    lookout = Lookout(stop, lambda: Meeting.of(store), [Process.this(f"worker of rank {rank}", rank)], expected)
    said = settings.ballot(config, mode, missing, mine is not None)
    deadline_s = float(os.environ.get("HMR_GUARD_DEADLINE") or DEADLINE_S)
    sentence = decide(meeting, "start", said, rank, num_ranks, deadline_s, settings.judge)
    if sentence and "did not answer" in sentence:
        sentence += ": it may lack the plug-in; install it for every rank and set HMR_GUARD alike"
    if not sentence:
        stop.say(f"{mode}: all {num_ranks} ranks are guarded")
    elif not stop.agrees:
        stop.observe(f"{sentence}; the guard is off")
        return
    lookout.start()
    if sentence:
        guard.refuse(sentence)
    lookout.guard, current, _ranks_per_engine = guard, guard, per_engine


def raise_or_say(stop: Stop, why: str) -> None:
    """This rank cannot take part in a vote. Raises Refused in the mode ``agree``."""
    if not stop.agrees:
        stop.say(f"off: {why}")
        return
    stop.begin(f"{why}: unset HMR_GUARD")
    raise Refused(stop.sentence)


def ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap WorkerProc.shutdown."""

    @wraps(original)
    def shutdown(self: Any, *args: Any, **options: Any) -> Any:
        if lookout is not None:
            lookout.leave()
        return original(self, *args, **options)

    return shutdown


# -- executions ------------------------------------------------------------------------------------------------------


def executing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.execute_model. Without scheduled tokens it runs no model."""

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        guard = current
        if guard is None or not getattr(scheduler_output, "total_num_scheduled_tokens", 1):
            return original(self, scheduler_output, *args, **options)
        return _execute(guard, True, original, self, scheduler_output, *args, **options)

    return execute_model


def executing_always(requested: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap Worker.execute_dummy_batch, or a phase of the start, in which no engine counts executions."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def method(self: Any, *args: Any, **options: Any) -> Any:
            guard = current
            if guard is None:
                return original(self, *args, **options)
            return _execute(guard, requested, original, self, *args, **options)

        return method

    return hook


def _execute(guard: Guard, requested: bool, original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    guard.begin_execution(requested)
    try:
        return original(*args, **options)
    except Exception as error:
        guard.fail(error)
        raise
    finally:
        guard.end_execution()


# -- collectives -----------------------------------------------------------------------------------------------------


class Distributed:
    """torch.distributed as the modules with C1 see it: the all-reduce of C1 gets the guard's rows."""

    def __init__(self, dist: Any) -> None:
        self._dist = dist

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dist, name)

    def all_reduce(self, tensor: Any, *args: Any, **options: Any) -> Any:
        guard = current
        if guard is None or not guard.watches() or args or set(options) - {"group"} or not _is_agreement(guard, tensor):
            return self._dist.all_reduce(tensor, *args, **options)
        group = _group_of(options.get("group"))
        guard.agree(group.name, tensor, lambda wide: self._dist.all_reduce(wide, **options))
        return None


def _is_agreement(guard: Guard, tensor: Any) -> bool:
    return tensor.dim() == 2 and tensor.shape[1] == len(guard.members) and not tensor.is_floating_point()


def widening(original: Any) -> Any:
    """Replace the name ``dist`` in a module with C1."""
    return original if isinstance(original, Distributed) else Distributed(original)


def naming(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap GroupCoordinator.__init__: vLLM gives torch no names of its groups."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        name = str(getattr(self, "unique_name", "") or "").partition(":")[0]
        for attribute, suffix in (("device_group", ""), ("cpu_group", ".cpu")):
            group = getattr(self, attribute, None)
            if name and group is not None and group not in _names:
                _names[group] = name + suffix

    return __init__


def exchanging(op: str, attribute: str = "device_group") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a method that issues one collective. attribute: where the object has its process group."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def exchange(self: Any, *args: Any, **options: Any) -> Any:
            guard = current
            if guard is None or _compiling() or not guard.watches():
                return original(self, *args, **options)
            group = _group_of(getattr(self, attribute, None))
            if not group.shared:
                return original(self, *args, **options)
            return guard.issue(group.name.removesuffix(".cpu"), op, lambda: original(self, *args, **options))

        return exchange

    return hook


def calling(op: str) -> Callable[[Any], Any]:
    """Wrap a method of torch's ProcessGroup: what goes by vLLM's own classes."""

    def hook(original: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            guard = current
            if guard is None or not guard.watches():
                return original(self, *args, **options)
            group = _group_of(self)
            if not group.shared:
                return original(self, *args, **options)
            return guard.issue(group.name, op, lambda: original(self, *args, **options))

        return call

    return hook


def in_layer(attribute: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wrap a layer's method; ``attribute`` contains the layer's name."""

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def forward(self: Any, *args: Any, **options: Any) -> Any:
            guard = current
            if guard is None or _compiling():
                return original(self, *args, **options)
            outer, guard.layer = guard.layer, str(getattr(self, attribute, ""))
            try:
                return original(self, *args, **options)
            finally:
                guard.layer = outer

        return forward

    return hook


def _compiling() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_compiling()


def _group_of(group: Any) -> _Group:
    known = _groups.get(id(group))
    if known is not None and known.group() is group:
        return known
    import torch.distributed as dist

    try:
        ranks = dist.get_process_group_ranks(group)
        name = _names.get(group) or f"a group of {len(ranks)} ranks"
        found = _Group(weakref.ref(group), name, len({rank // _ranks_per_engine for rank in ranks}) > 1)
    except Exception:  # no process group of torch.distributed, such as those of the engines
        return _Group(None, "", False)
    _groups[id(group)] = found
    return found
