"""Record DistributedDataParallel, whose reducer issues its collectives in C++.

Python does not see the collectives of the reducer's buckets. So each action of a DistributedDataParallel object ("the
wrapper") in which all ranks must take part is recorded as one collective: the wrapper's creation, each broadcast of the
buffers, the rebuild of the buckets, and each backward pass that averages gradients.
"""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import collectives
from repro.attach.record import rank as this
from repro.attach.record.groups import group_of
from repro.attach.record.imports import replace

LAYER = "DistributedDataParallel"
_ready: dict[str, list[int]] = {}  # group name -> members, for each wrapper whose next backward pass averages gradients
_passes: list[tuple[Collective, int]] = []
"""The collectives of the backward pass that runs now, each with the number (ticket) of its record in the witness."""

_noted: list[tuple[Collective, int]] = []  # the last entry of _passes whose wait has been recorded


def hook(module: ModuleType) -> None:
    owner = module.DistributedDataParallel
    for name, op in (("__init__", "ddp_init"), ("_sync_buffers", "ddp_send_buffers"), ("_pre_forward", "")):
        replace(owner, name, functools.partial(_blocking, op))
    replace(owner, "_post_forward", _preparing)


def hook_backward(module: ModuleType) -> None:
    """Hook the function of torch.autograd.graph that runs a backward pass, to record that DDP averages gradients."""
    replace(module, "_engine_run_backward", _passing)


def _blocking(op: str, original: Any) -> Any:
    """Return the hook of a method of DistributedDataParallel that issues collectives in C++ and waits for them.

    op: the operation's name in the witness; "" for the forward pass, which is recorded only if it rebuilds the buckets
    """

    def method(self: Any, *args: Any, **options: Any) -> Any:
        rank = this.current
        if rank is None or _is_compiling() or (not op and not _rebuilds(self)):
            return original(self, *args, **options)
        if op == "ddp_init":  # the group comes from an argument, because the wrapper does not have it yet
            group = options.get("process_group")
            name, members = "world", []
            if group is not None:
                known = group_of(rank, group)
                name, members = known.name, known.members
        else:
            known = group_of(rank, self.process_group)
            name, members = known.name, known.members
        collective = _collective(rank, name, members, op or "ddp_rebuild_buckets")
        with rank.lock:
            rank.recorder.enter(collective)
            ticket = rank.recorder.last_seq
        result = original(self, *args, **options)
        with rank.lock:
            rank.recorder.leave(collective, ticket)
        return result

    return method


def _rebuilds(wrapper: Any) -> bool:
    """Count a forward pass of a DistributedDataParallel object. Returns whether it is the second.

    The second forward pass rebuilds the buckets.
    """
    done: int = wrapper.__dict__.get("_hmr_passes", 0)
    wrapper.__dict__["_hmr_passes"] = done + 1
    return done == 1


def _preparing(original: Any) -> Any:
    def _post_forward(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        rank = this.current
        if rank is not None and not _is_compiling() and self.require_backward_grad_sync and _grad_enabled():
            known = group_of(rank, self.process_group)
            _ready[known.name] = known.members
        return result

    return _post_forward


def _passing(original: Any) -> Any:
    def _engine_run_backward(*args: Any, **options: Any) -> Any:
        rank = this.current
        if rank is None or not _ready or threading.current_thread() is not threading.main_thread():
            return original(*args, **options)
        for name, members in _ready.items():
            collective = _collective(rank, name, members, "ddp_average_gradients")
            _passes.append((collective, collectives.issued(rank, collective)))
        _ready.clear()
        result = original(*args, **options)
        with rank.lock:
            for collective, ticket in _passes:
                rank.recorder.leave(collective, ticket)
            _passes.clear()
        return result

    return _engine_run_backward


def note_wait(rank: Any) -> None:
    """Record that the main thread waits for the gradient averages, if a recorded backward pass runs.

    Call this when the main thread is inside autograd's engine and the process uses almost no CPU. Each backward pass
    gets at most one such record. More records would make a rank that hangs look active.
    """
    with rank.lock:
        if _passes and _passes[0] not in _noted:
            _noted[:] = _passes[:1]
            rank.recorder.wait(*_passes[0])


def _collective(rank: Any, name: str, members: list[int], op: str) -> Collective:
    """Return one collective that stands for all that DDP's reducer issues in the group ``name`` during ``op``.

    It is not known how many collectives the reducer issues, so the returned collective cannot have a number in the
    group ``name``. It belongs to an extra group, "NAME.ddp", which has the same members.

    members: the ranks of the group, which are recorded as the members of the extra group; [] to record none
    """
    group = f"{name}.ddp"
    if members:
        with rank.lock:
            rank.recorder.groups({group: members})
    return Collective(group, op, rank.local.layer or LAYER)


def _is_compiling() -> bool:
    import torch

    return bool(torch.compiler.is_compiling())


def _grad_enabled() -> bool:
    import torch

    return bool(torch.is_grad_enabled())
