"""Hooks of a worker: the worker takes part in the start vote, and its collectives go through the guard.

In the start vote, the ranks compare their settings. Only collectives of groups that span several engines are guarded.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from repro.attach.notice import notice
from repro.attach.vllm import dynamo
from repro.attach.vllm.guard.ending.guard_thread import GuardThread
from repro.attach.vllm.guard.ending.peers import Process
from repro.attach.vllm.guard.ending.stop import Refused, Stop
from repro.attach.vllm.guard.meeting import board, settings
from repro.attach.vllm.guard.meeting.meeting import Meeting, root_of
from repro.attach.vllm.guard.meeting.vote import decide
from repro.attach.vllm.guard.schedule.guard import Guard

DEADLINE_S = 60.0
"""How many seconds the ranks wait for each other in the start vote, unless HMR_GUARD_DEADLINE is set."""

current: Guard | None = None
"""The guard of this process. None if the process is not a worker, or if the ranks did not agree to be guarded."""

guard_thread: GuardThread | None = None
missing: list[str] = []
"""The essential hooks whose attributes this version of vLLM lacks."""


class _Group(NamedTuple):
    """What the guard knows of a process group of torch.

    group   weak reference to the group
    name    vLLM's name of the group
    shared  whether its members belong to several engines; the guard compares only the collectives of such groups
    """

    group: Any
    name: str
    shared: bool


_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_groups: dict[int, _Group] = {}
_ranks_per_engine = 1


def after_fork() -> None:
    """Reset the state in a forked child, which is not the worker."""
    global current, guard_thread
    current = guard_thread = None
    _groups.clear()


# -- start and end ---------------------------------------------------------------------------------------------------


def initialising(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.init_device, to hold the start vote as soon as this method has made the process groups."""

    @wraps(original)
    def init_device(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        if guard_thread is None:
            guarded(join, self.vllm_config)
        return result

    return init_device


def guarded(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the guard. Raise Refused if the function raises it; print any other exception.

    So an error of the guard itself does not stop the server. After such an error, the result is None.
    """
    try:
        return call(*args)
    except Refused:
        raise
    except Exception as error:
        notice(f"repro guard: off in this process: {type(error).__name__}: {error}")
        return None


def join(config: Any) -> None:
    """Take part in the start vote, in which all ranks compare their settings. If they agree, switch on the guard.

    If they do not agree, raise Refused; with HMR_GUARD=observe, only print why the guard is off. With one data-parallel
    rank there is no vote, and the guard is off.

    config: VllmConfig
    """
    global current, guard_thread, _ranks_per_engine
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
    me = Process.this(f"worker of rank {rank}", rank)
    guard_thread = GuardThread(stop, lambda: Meeting.of(store), [me], expected)
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
    guard_thread.start()
    if sentence:
        guard.refuse(sentence)
    guard_thread.guard, current, _ranks_per_engine = guard, guard, per_engine


def raise_or_say(stop: Stop, why: str) -> None:
    """Raise Refused, because this rank cannot take part in the start vote. With HMR_GUARD=observe, only print why.

    stop: prints the line, and ends this process after a refusal; why: why the rank cannot take part
    """
    if not stop.agrees:
        stop.say(f"off: {why}")
        return
    stop.begin(f"{why}: unset HMR_GUARD")
    raise Refused(stop.sentence)


def ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap WorkerProc.shutdown, to announce to the other processes that this worker ends normally."""

    @wraps(original)
    def shutdown(self: Any, *args: Any, **options: Any) -> Any:
        if guard_thread is not None:
            guard_thread.leave()
        return original(self, *args, **options)

    return shutdown


# -- executions ------------------------------------------------------------------------------------------------------


def executing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.execute_model, to note when an execution of the model begins and ends.

    A call without scheduled tokens does not run the model, so it is no execution.
    """

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        guard = current
        if guard is None or not getattr(scheduler_output, "total_num_scheduled_tokens", 1):
            return original(self, scheduler_output, *args, **options)
        return _execute(guard, True, original, self, scheduler_output, *args, **options)

    return execute_model


def executing_always(requested: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for a method that always runs the model, to note when this execution begins and ends.

    requested: whether the engine requests and counts these executions. True for Worker.execute_dummy_batch; False for a
    phase of the start
    """

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
    """A replacement for the module torch.distributed in those modules of vLLM that issue C1, the step agreement.

    It adds two rows to the tensor that C1 all-reduces, by which the ranks compare themselves, and passes
    everything else on to torch.distributed.
    """

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
    """Return the replacement for ``dist`` (torch.distributed) in a module of vLLM that issues C1."""
    return original if isinstance(original, Distributed) else Distributed(original)


def naming(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap GroupCoordinator.__init__, to note the names of vLLM's groups, which torch does not know."""

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
    """Return a decorator for a method of vLLM that issues one collective, so that the guard checks this collective.

    op: the name of the collective; attribute: the attribute in which the method's object has the process group
    """

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        is_tracing = dynamo.tracing_test()

        @wraps(original)
        def exchange(self: Any, *args: Any, **options: Any) -> Any:
            guard = current
            if guard is None or is_tracing() or not guard.watches():
                return original(self, *args, **options)
            group = _group_of(getattr(self, attribute, None))
            if not group.shared:
                return original(self, *args, **options)
            return guard.issue(group.name.removesuffix(".cpu"), op, lambda: original(self, *args, **options))

        return exchange

    return hook


def calling(op: str) -> Callable[[Any], Any]:
    """Return a decorator for a method of torch's ProcessGroup, so that the guard checks the method's collective.

    This is for collectives that vLLM's own classes do not issue.

    op: the name of the collective
    """

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
    """Return a decorator for a layer's method, to note which layer runs.

    attribute: the attribute in which the layer has its name
    """

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        is_tracing = dynamo.tracing_test()

        @wraps(original)
        def forward(self: Any, *args: Any, **options: Any) -> Any:
            guard = current
            if guard is None or is_tracing():
                return original(self, *args, **options)
            outer, guard.layer = guard.layer, str(getattr(self, attribute, ""))
            try:
                return original(self, *args, **options)
            finally:
                guard.layer = outer

        return forward

    return hook


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
