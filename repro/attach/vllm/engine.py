"""Hooks for vLLM's EngineCore, which writes its progress to a file (:mod:`repro.attach.vllm.notes`).

If the worker has a process of its own, the engine issues no collective of torch's default groups. It only asks "is
anyone unfinished?" in a group of the engines. If the worker is in the same process, the rank itself records the
question.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from repro.attach.record import collectives
from repro.attach.record import rank as this
from repro.attach.vllm.harmless import Harmless
from repro.attach.vllm.notes import Activity, Note, Notes, create

current: Notes | None = None
"""The notes of this process if it is an EngineCore, else None."""

_requested = False  # whether an execution was requested since the engine last counted one
_owner_pid = 0


def after_fork() -> None:
    """Reset the state in a forked child, which is not the engine."""
    global current
    current = None


def begin(config: Any) -> None:
    """Create the notes file of this process. config: vLLM's ParallelConfig."""
    global current, _owner_pid
    if _owner_pid == os.getpid():
        return
    _owner_pid = os.getpid()
    with Harmless("the engine of this rank"):
        current = create(this.folder(config.world_size_across_dp), first_worker(config))


def first_worker(config: Any) -> int:
    """Return the rank of an engine's first worker. The witness of this rank shows what the engine does."""
    return int(config.data_parallel_rank) * int(config.world_size)


def note_request() -> None:
    """Note that the engine has requested a model execution."""
    global _requested
    _requested = True


def constructing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DPEngineCoreProc._init_data_parallel, which runs once before the engine creates its group."""

    @wraps(original)
    def _init_data_parallel(self: Any, vllm_config: Any, *args: Any, **options: Any) -> Any:
        begin(getattr(vllm_config, "parallel_config", None))
        return original(self, vllm_config, *args, **options)

    return _init_data_parallel


def requesting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Executor.execute_model, which runs the model if tokens are scheduled."""

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if getattr(scheduler_output, "total_num_scheduled_tokens", 1) > 0:
            note_request()
        return original(self, scheduler_output, *args, **options)

    return execute_model


def requesting_dummy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Executor.execute_dummy_batch, which runs the model without requests."""

    @wraps(original)
    def execute_dummy_batch(self: Any, *args: Any, **options: Any) -> Any:
        note_request()
        return original(self, *args, **options)

    return execute_dummy_batch


def counting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DPEngineCoreProc._has_global_unfinished_reqs, which counts the executions of a wave."""

    @wraps(original)
    def _has_global_unfinished_reqs(self: Any, *args: Any, **options: Any) -> Any:
        global _requested
        notes, was_requested, _requested = current, _requested, False
        if notes is not None:
            notes[Note.COUNTED] += 1
            if not was_requested:
                notes[Note.FIRST] = notes[Note.FIRST] or notes[Note.COUNTED]
                notes[Note.SKIPPED] += 1
        unfinished = original(self, *args, **options)
        if notes is not None and not unfinished:
            notes[Note.WAVES] += 1
        return unfinished

    return _has_global_unfinished_reqs


def asking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ParallelConfig.sync_dp_state (has_unfinished_dp in 0.20), a static method: "is anyone unfinished?"."""

    @wraps(original)
    def sync_dp_state(*args: Any, **options: Any) -> Any:
        notes = current
        if notes is None or collectives.inside():
            return original(*args, **options)
        notes[Note.ASKED] += 1
        try:
            with collectives.beneath():
                return original(*args, **options)
        finally:
            notes[Note.ANSWERED] += 1

    return sync_dp_state


def waiting_for_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap EngineCoreProc._process_input_queue, which returns when there is work."""

    @wraps(original)
    def _process_input_queue(self: Any, *args: Any, **options: Any) -> Any:
        notes = current
        if notes is None:
            return original(self, *args, **options)
        notes[Note.ACTIVITY] = Activity.WAITS_FOR_REQUESTS
        try:
            return original(self, *args, **options)
        finally:
            notes[Note.ACTIVITY] = Activity.WORKS

    return _process_input_queue
