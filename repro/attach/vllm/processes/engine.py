"""Hooks for vLLM's engine (EngineCore), which write its progress into a file (see `repro.attach.vllm.processes.notes`).

An engine is the process that schedules the requests for one or more workers. It asks the other engines "is anyone
unfinished?" by an all-reduce in a group of engines. The worker, which writes the witness, cannot see this all-reduce.
So the file shows how many of these questions the engine has begun and ended.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from repro.attach.record import collectives
from repro.attach.record import rank as this
from repro.attach.vllm.harmless import Harmless
from repro.attach.vllm.processes.notes import Activity, Note, Notes, create

current: Notes | None = None
"""The notes file of this process, which is an EngineCore; None if it is not."""

_requested = False  # whether the engine has requested an execution of its worker since it last counted one
_owner_pid = 0


def after_fork() -> None:
    """Reset the state in a forked child, which is not the engine."""
    global current
    current = None


def begin(config: Any) -> None:
    """Create the file in which this engine notes what it does. config: vLLM's ParallelConfig."""
    global current, _owner_pid
    if _owner_pid == os.getpid():
        return
    _owner_pid = os.getpid()
    with Harmless("the engine of this rank"):
        current = create(this.folder(config.world_size_across_dp), first_worker(config))


def first_worker(config: Any) -> int:
    """Return the rank of an engine's first worker, whose witness shows what the engine does. config: ParallelConfig."""
    return int(config.data_parallel_rank) * int(config.world_size)


def note_request() -> None:
    """Note that the engine has requested an execution of the model from its worker."""
    global _requested
    _requested = True


def constructing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DPEngineCoreProc._init_data_parallel, to create this engine's notes file before the engines connect."""

    @wraps(original)
    def _init_data_parallel(self: Any, vllm_config: Any, *args: Any, **options: Any) -> Any:
        begin(getattr(vllm_config, "parallel_config", None))
        return original(self, vllm_config, *args, **options)

    return _init_data_parallel


def requesting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Executor.execute_model: if tokens are scheduled, note that the engine requests an execution."""

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if getattr(scheduler_output, "total_num_scheduled_tokens", 1) > 0:
            note_request()
        return original(self, scheduler_output, *args, **options)

    return execute_model


def requesting_dummy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Executor.execute_dummy_batch, to note that the engine requests the execution of a dummy batch."""

    @wraps(original)
    def execute_dummy_batch(self: Any, *args: Any, **options: Any) -> Any:
        note_request()
        return original(self, *args, **options)

    return execute_dummy_batch


def counting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DPEngineCoreProc._has_global_unfinished_reqs, which the engine calls once after each execution.

    The wrapper counts all calls. It also counts the calls before which the engine had requested no execution from its
    worker, and the waves: a wave ends when this method says that no engine has unfinished requests.
    """

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
    """Wrap ParallelConfig.sync_dp_state, by which an engine asks the other engines "is anyone unfinished?".

    The wrapper counts how many of these questions have begun and how many have ended. In vLLM 0.20 the method is called
    has_unfinished_dp.
    """

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
    """Wrap EngineCoreProc._process_input_queue, to note that the engine waits for requests during this method."""

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
