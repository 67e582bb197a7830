"""The hook of dispatch and combine, the collectives by which vLLM's ranks exchange the rows (tokens) of a MoE layer.

The hook wraps a method of vLLM, and records each dispatch and each combine as one collective.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from hybrid_moe_ref.parallel.observer import Collective
from repro.attach.record import collectives, compiled
from repro.attach.record import rank as this
from repro.attach.record.groups import group_of
from repro.attach.record.methods import dtype_of
from repro.attach.vllm import dynamo, worker
from repro.attach.vllm.harmless import Harmless


def exchanging(op: str, num_tensors: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for a method of vLLM's GroupCoordinator that is a dispatch or a combine, such as all_gatherv.

    The decorated method records each of its calls as one collective, whatever collectives of torch implement it.

    op: the name of the recorded collective
    num_tensors: number of the method's positional arguments before ``dim`` and ``sizes``
    """

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        recorded, is_tracing = _recorded_exchange(op, num_tensors, original), dynamo.tracing_test()
        if (library := compiled.load()) is not None:
            resolve = partial(_resolve_exchange, op, num_tensors)
            recorded = library.Exchange(original, recorded, resolve, num_tensors + 2)

        @wraps(original)
        def exchange(*args: Any, **options: Any) -> Any:
            return original(*args, **options) if is_tracing() else recorded(*args, **options)

        return exchange

    return hook


def _recorded_exchange(op: str, num_tensors: int, original: Callable[..., Any]) -> Callable[..., Any]:
    entering = Harmless(f"{op} with its layer and sizes")

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        at = worker.current
        if at is None or collectives.inside():
            return original(self, *args, **options)
        call = None
        with entering:
            collective = _exchange(at.rank, op, num_tensors, self.device_group, args, options)
            with at.rank.lock:
                at.rank.recorder.enter(collective)
                call, ticket = at.rank.recorder.last_call, at.rank.recorder.last_seq
        if call is None:
            return original(self, *args, **options)
        with collectives.beneath():
            result = original(self, *args, **options)
        with at.rank.lock:
            at.rank.recorder.leave(None, ticket, call)
        return result

    return recorded


def _resolve_exchange(op: str, num_tensors: int, group: Any, *args: Any, **options: Any) -> Any:
    """Read a dispatch or combine for the hook in C, which calls this if it has not seen a call like this one yet.

    Returns what the recorder keeps for such calls, the number of frames from the caller of the hook to the call site,
    and False: the recorder does not ask later if the collective is complete. Returns None if this process is no rank.
    """
    at = worker.current
    if at is None:
        return None
    collective = _exchange(at.rank, op, num_tensors, group.device_group, args, options)
    with at.rank.lock:
        recorder: Any = at.rank.recorder  # a compiled one: the hook asks for no other
        return *recorder.call_at(sys._getframe(1), collective), False


def _exchange(
    rank: this.Rank, op: str, num_tensors: int, device_group: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Collective:
    """Return the collective that is recorded for a dispatch or combine.

    device_group: the process group of the call; args, options: the hooked method's arguments
    """
    rows = args[0] if args else options.get("input_")
    position = num_tensors + 1  # the sizes come after the tensors and dim
    sizes = options.get("sizes", args[position] if len(args) > position else None)
    group = group_of(rank, device_group)
    vector = () if sizes is None else tuple(map(int, sizes))
    return Collective(group.name, op, rank.local.layer, vector, dtype_of(rows))
