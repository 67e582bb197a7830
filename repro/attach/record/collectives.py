"""Record the collectives that a program calls on torch's process groups.

torch.distributed's functions, libraries that use c10d directly, FSDP and pipelines all call the methods of ProcessGroup
or of its backends. The hooks replace these methods. The hooks do not replace the functions of torch.distributed, for
two reasons: torch.compile recognises these functions by identity, so it would not recognise a replacement; and some
programs replace these functions themselves, which would remove the hooks.

A "work" is torch's object for an issued collective.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.notice import notice
from repro.attach.record import compiled
from repro.attach.record import rank as this
from repro.attach.record.groups import group_of
from repro.attach.record.imports import replace
from repro.attach.record.methods import METHODS, Method, dtype_of, reduction_of

if TYPE_CHECKING:
    from repro.attach.record.rank import Rank
    from repro.trace.recording.calls import Call

Calls = tuple[tuple["Call", int], ...]
"""Recorded calls, each with its ticket, which is the number of its collective in the group."""

_library: Any = compiled.load()
_pending: dict[int, tuple[Any, Calls, bool, bool]] = {} if _library is None else _library.pending
"""Issued works that are not known to be complete: id(work) -> (weak reference, calls, blocking, pollable).

calls      the collectives of the work; a coalesced work has several
blocking   whether the program waits for the work at once
pollable   whether the recorder is allowed to ask the work at any time if it is complete
"""

_unread: set[str] = set()


class _Thread(threading.local):
    """The recorder's state in one thread.

    inside     whether a hook of a process group's method runs; collectives that it causes are not recorded again
    coalesced  the calls of the open coalescing block, in which torch collects collectives to issue them together; each
               with the number of its collective in the group. None if no block is open
    """

    inside = False
    coalesced: list[tuple[Call, int]] | None = None


_thread: Any = _Thread() if _library is None else _library.Thread()


def hook(c10d: Any) -> None:
    """Replace the methods of ProcessGroup, Backend and Work by which a program issues collectives and waits for them.

    c10d: the module torch._C._distributed_c10d
    """
    for owner in (c10d.ProcessGroup, c10d.Backend):
        for name, method in METHODS.items():
            replace(owner, name, functools.partial(_hook, name, method))
        replace(owner, "_start_coalescing", _recorded_start)
        replace(owner, "_end_coalescing", _recorded_end)
    if _library is not None:
        for options in vars(c10d).values():
            if isinstance(options, type) and options.__name__.endswith("Options"):
                _hook_options(options, c10d.ReduceOp.RedOpType)
    for kind in (c10d.Work, *c10d.Work.__subclasses__()):
        if "wait" in vars(kind):
            replace(kind, "wait", _recorded_wait if _library is None else _compiled_wait)


def _hook_options(options: Any, reductions: Any) -> None:
    """Replace the properties asyncOp, rootRank and reduceOp of a class of options, if the class has them.

    When the program or torch sets a replaced property, the compiled library notes the value. So the hook of the call
    that gets these options does not have to read the property, which takes longer than writing an event.

    options: a class of torch, such as AllreduceOptions; reductions: torch's enum of the reductions
    """
    for name, original in list(vars(options).items()):
        if name in ("asyncOp", "rootRank", "reduceOp") and isinstance(original, property) and original.fset:
            constants = tuple(reductions.__members__.values()) if name == "reduceOp" else ()
            setattr(options, name, _library.Option(original, name, constants))


def inside() -> bool:
    """Whether this thread is inside a recorded call. Calls within such a call are not recorded again."""
    return bool(_thread.inside)


class beneath:
    """A ``with`` block in which this thread's collectives are not recorded, because they are part of a recorded call.

    For example, vLLM's dispatch is one recorded call, whatever collectives of torch it issues. This is a class, because
    a context manager made from a generator takes as long as the recording itself.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        _thread.inside = True

    def __exit__(self, *_: object) -> None:
        _thread.inside = False


def _named(name: str, function: Any) -> Any:
    """Give the code of a hook the name of the method of torch that it replaces, to prevent an endless recursion.

    If the program derived a Python class from torch's class, torch's method (made by pybind11) first looks for a Python
    method that overrides it. It would find the hook, which would call torch's method again, and so on. pybind11 does
    not look if the calling function has the method's name and has the same object as its first argument.

    name: the method's name; function: the hook, which is also returned
    """
    function.__code__ = function.__code__.replace(co_name=name)
    return function


def _hook(name: str, method: Method, original: Any) -> Any:
    """Return the hook that replaces torch's method ``original``.

    The hook is in C if the compiled library exists and can read calls of this method, else in Python.

    name: the method's name; method: how to read its arguments
    """
    slow = _named(name, _recorded(method, original))
    if _library is None or method.compiled is None:
        return slow

    def resolve(group: Any, *args: Any, **options: Any) -> tuple[Call, int, bool] | None:
        """Read a call of the hooked method. The hook in C calls this if it does not know calls of this kind yet.

        Two calls are of the same kind if they have the same call site, process group, phase, layer, and arguments
        (dtype, reduction, root, asyncOp); sizes and tensors can differ.

        Returns None if the call is not recorded, otherwise three values:

        - the `Call`: the prepared records of all calls of this kind
        - the number of frames from the caller of the hook to the call site
        - whether the recorder is allowed to ask at any time if the collective is complete
        """
        rank = this.current
        read = _read(rank, group, method, args, options) if rank is not None else None
        if rank is None or read is None:
            return None
        collective, _, on_host = read
        with rank.lock:
            recorder: Any = rank.recorder  # a compiled one: the hooks ask for no other
            return *recorder.call_at(sys._getframe(1), collective), on_host

    sized, has_tensor = method.compiled
    return _library.Issue(original, slow, resolve, sized, has_tensor, method.rooted, method.reduces, method.one_sided)


def _recorded(method: Method, original: Any) -> Any:
    # This runs at each collective of the program, so everything that can be prepared is prepared outside.
    def call(self: Any, *args: Any, **options: Any) -> Any:
        rank = this.current
        if rank is None or _thread.inside:
            return original(self, *args, **options)
        read = _read(rank, self, method, args, options)
        if read is None:
            return original(self, *args, **options)
        collective, asynchronous, on_host = read
        recorder, lock = rank.recorder, rank.lock
        with lock:
            recorder.enter(collective, asynchronous)
            issued = recorder.last_call
            ticket = issued.group.seq
        _thread.inside = True
        try:
            work = original(self, *args, **options)
        finally:
            _thread.inside = False
        if _thread.coalesced is not None:
            _thread.coalesced.append((issued, ticket))
        elif work is None:
            with lock:
                recorder.leave(None, ticket, issued)
        else:
            asked = asynchronous and on_host
            _pending[id(work)] = (weakref.ref(work), ((issued, ticket),), not asynchronous, asked)
        return work

    return call


def _read(
    rank: Rank, group: Any, method: Method, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Collective, bool, bool] | None:
    """Return the collective of a call, whether the call is asynchronous, and whether the group works on the host (CPU).

    If an argument has an unknown form, the collective lacks this argument and those that are read after it, and a
    printed line says so, once for each operation. Returns None if the group is unknown.
    """
    op = method.op
    try:
        known = group_of(rank, group)
    except Exception as error:
        say_once(rank, op, error)
        return None
    asynchronous, root, reduction, dtype = True, -1, "", ""
    sizes: tuple[int, ...] = ()
    try:
        first = args[0] if args else None
        second = args[1] if len(args) > 1 else None
        if method.one_sided:
            root = int(second if second is not None else options.get("dstRank", options.get("srcRank", -1)))
        else:
            opts: Any = options["opts"] if "opts" in options else args[-1] if args else None
            asynchronous = getattr(opts, "asyncOp", op != "monitored_barrier")
            if method.rooted:
                root = known.members[opts.rootRank]
            if method.reduces:
                reduction = reduction_of(opts)
        sizes = method.sizes(first, second)
        dtype = dtype_of(first) or dtype_of(second)  # in a gather, only the root has a list for the output
    except Exception as error:
        say_once(rank, op, error)
    return Collective(known.name, op, rank.local.layer, sizes, dtype, reduction, root), asynchronous, known.on_host


def say_once(rank: Rank, op: str, error: Exception) -> None:
    if op not in _unread:
        _unread.add(op)
        problem = f"{type(error).__name__}: {error}"
        notice(f"[rank {rank.rank}] repro record: the arguments of {op} are not recorded: {problem}")


def _recorded_wait(original: Any) -> Any:
    def wait(self: Any, *args: Any, **options: Any) -> Any:
        pending = _pending.pop(id(self), None)
        rank = this.current
        if pending is None or rank is None or pending[0]() is not self:
            return original(self, *args, **options)
        _, calls, blocking, _ = pending
        if not blocking:
            with rank.lock:
                for call, ticket in calls:
                    rank.recorder.wait(None, ticket, call)
        done = original(self, *args, **options)
        with rank.lock:
            for call, ticket in calls:
                rank.recorder.leave(None, ticket, call)
        return done

    return wait  # its code has the name of its method: see _named


def _compiled_wait(original: Any) -> Any:
    return _library.Wait(original, _recorded_wait(original))


def _recorded_start(original: Any) -> Any:
    def start(self: Any, *args: Any, **options: Any) -> Any:
        _thread.coalesced = []
        return original(self, *args, **options)

    return start


def _recorded_end(original: Any) -> Any:
    def end(self: Any, *args: Any, **options: Any) -> Any:
        calls, _thread.coalesced = _thread.coalesced, None
        work = original(self, *args, **options)
        if calls and work is not None:
            _pending[id(work)] = (weakref.ref(work), tuple(calls), False, False)
        return work

    return end


# -- collectives that C++ code issues --------------------------------------------------------------------------------


def issued(rank: Rank, collective: Collective) -> int:
    """Record that C++ code issues a collective. Returns the ticket: the number of the collective in its group."""
    with rank.lock:
        return rank.recorder.issue(collective)


def note_completions(rank: Rank) -> None:
    """Record which collectives have completed, among those for which no Python code has waited.

    Only asynchronous collectives of groups on the host (CPU) are checked. On a device, the check would end the capture
    of a CUDA graph.
    """
    if _library is not None:
        _library.spill()
    for key, (get_work, calls, _, asked) in list(_pending.items()):
        work = get_work()
        if work is None:
            _pending.pop(key, None)
        elif asked and work.is_completed() and _pending.pop(key, None) is not None:
            with rank.lock:  # `_pending` still had the work: the main thread is not in its `wait`
                for call, ticket in calls:
                    rank.recorder.leave(None, ticket, call)
