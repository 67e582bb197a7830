"""Hooks of vLLM's engine (EngineCore), the process that schedules requests for one or more workers.

The hooks start a guard thread in the engine, and count the executions of the model. The counts are on the engine's
board, which is memory that the engine shares with its workers.
"""

from __future__ import annotations

import multiprocessing.process
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from repro.attach.notice import notice
from repro.attach.vllm.guard.ending.guard_thread import GuardThread, front_end_of
from repro.attach.vllm.guard.ending.peers import Process
from repro.attach.vllm.guard.ending.stop import Stop
from repro.attach.vllm.guard.meeting import board
from repro.attach.vllm.guard.meeting.board import Board, Field
from repro.attach.vllm.guard.meeting.meeting import Meeting
from repro.attach.vllm.guard.schedule.post import left_out

current: Board | None = None
"""The board of this process, which is an engine; None if it is not."""

guard_thread: GuardThread | None = None
_engine: Any = None
_rank = 0
_counts_requests = False  # whether a hook has seen this engine request an execution


def after_fork() -> None:
    global current, guard_thread, _engine
    current = guard_thread = _engine = None


def constructing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DPEngineCoreProc._init_data_parallel, to start the guard thread before the engine starts its workers."""

    @wraps(original)
    def _init_data_parallel(self: Any, vllm_config: Any, *args: Any, **options: Any) -> Any:
        try:
            begin(self, vllm_config.parallel_config)
        except Exception as error:
            notice(f"repro guard: this engine is not watched: {type(error).__name__}: {error}")
        return original(self, vllm_config, *args, **options)

    return _init_data_parallel


def begin(engine: Any, config: Any) -> None:
    """Make the memory that this engine will share with its workers, and start the guard thread.

    The guard thread watches the other processes.

    engine: vLLM's EngineCore in this process; config: vLLM's ParallelConfig
    """
    global current, guard_thread, _engine, _rank
    per_engine = int(config.world_size)
    _rank, _engine = int(config.data_parallel_rank) * per_engine, engine
    mine = current = board.create()

    def connect() -> Meeting | None:
        place = mine.meeting()
        return Meeting.at(*place) if place is not None else None

    num_ranks = int(config.world_size_across_dp)
    expected = [f"worker of rank {rank}" for rank in range(num_ranks)]
    for first in range(0, num_ranks, per_engine):
        expected += [f"engine of rank {first}", f"front end of rank {first}"]
    stop = Stop(f"engine of rank {_rank}", os.environ.get("HMR_GUARD") == "agree", tell=_tell_front_end)
    processes = [Process.this(f"engine of rank {_rank}", _rank), front_end_of(_rank)]
    guard_thread = GuardThread(stop, connect, processes, expected, _exit_code)
    guard_thread.start()


def _tell_front_end() -> None:
    """Send the front end the message that an engine of vLLM sends when it fails.

    Without this message, a front end that waits for outputs would not notice that its engine has ended.
    """
    from vllm.v1.engine.core import EngineCoreProc

    _engine.output_queue.put_nowait(EngineCoreProc.ENGINE_CORE_DEAD)


def _exit_code(pid: int) -> int | None:
    """Return the exit code of a worker that this engine started; None while it runs, or if the code is not known."""
    workers = getattr(getattr(_engine, "model_executor", None), "workers", None) or ()
    # during the start, the executor does not list its workers yet, but multiprocessing knows its children
    children: Any = vars(multiprocessing.process).get("_children", ())
    for process in (*(getattr(worker, "proc", None) for worker in workers), *children):
        if process is not None and process.pid == pid:
            code: int | None = process.exitcode
            return code
    return None


def requesting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an executor's execute_model: if tokens are scheduled, note that the engine requests an execution."""

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        if getattr(scheduler_output, "total_num_scheduled_tokens", 1) > 0:
            _note_request()
        return original(self, scheduler_output, *args, **options)

    return execute_model


def requesting_dummy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an executor's execute_dummy_batch, to note that the engine requests the execution of a dummy batch."""

    @wraps(original)
    def execute_dummy_batch(self: Any, *args: Any, **options: Any) -> Any:
        _note_request()
        return original(self, *args, **options)

    return execute_dummy_batch


def _note_request() -> None:
    global _counts_requests
    if current is not None:
        _counts_requests = True
        current.request()


def counting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap DPEngineCoreProc._has_global_unfinished_reqs, to count the executions of the model.

    The engine calls this method once after each execution.
    """

    @wraps(original)
    def _has_global_unfinished_reqs(self: Any, *args: Any, **options: Any) -> Any:
        if current is not None:
            _count(self, current)
        return original(self, *args, **options)

    return _has_global_unfinished_reqs


def _count(engine: Any, mine: Board) -> None:
    """Count one execution of the model, and check that the engine requested this execution from its worker.

    If it did not, raise Refused; with HMR_GUARD=observe only print a line. In vLLM's sleep mode an engine correctly
    requests no execution: then nothing is counted.

    engine: vLLM's EngineCore; mine: the memory with the counts, which the engine shares with its workers
    """
    mine[Field.COUNTED] += 1
    requested, counted = mine.executions()
    if counted <= requested or not _counts_requests:
        return
    if getattr(getattr(engine, "model_executor", None), "is_sleeping", False):
        mine[Field.COUNTED] = requested  # a sleeping engine rightly requests no execution
        return
    if mine[Field.LEFT_OUT]:
        return
    mine[Field.LEFT_OUT] = counted
    if guard_thread is not None:
        guard_thread.refuse_here(left_out(_rank, counted, counted, requested))


def asking(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ParallelConfig.sync_dp_state, by which an engine asks the other engines "is anyone unfinished?".

    The wrapper counts how many of these questions have begun and how many have ended, in the memory that the engine
    shares with its workers. In vLLM 0.20 the method is called has_unfinished_dp.
    """

    @wraps(original)
    def sync_dp_state(*args: Any, **options: Any) -> Any:
        mine = current
        if mine is None:
            return original(*args, **options)
        mine[Field.ASKED] += 1
        try:
            return original(*args, **options)
        except Exception as error:
            if guard_thread is not None:
                guard_thread.stop.explain(error)
            raise
        finally:
            mine[Field.ANSWERED] += 1

    return sync_dp_state


def ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap EngineCoreProc.shutdown, to announce how the engine ends: normally, or by which exception.

    vLLM calls this method in both cases.
    """

    @wraps(original)
    def shutdown(self: Any, *args: Any, **options: Any) -> Any:
        error = sys.exc_info()[1]
        if guard_thread is not None and isinstance(error, Exception):
            guard_thread.fail(f"rank {_rank} failed: its engine raised {type(error).__name__}: {error}")
        elif guard_thread is not None:
            guard_thread.leave(also=_workers())
        return original(self, *args, **options)

    return shutdown


def dying(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap EngineCoreProc._send_engine_dead, to announce the engine's exception before the front end learns of it.

    As soon as the front end learns of the exception, it ends the engine, so a later announcement would come too late.
    """

    @wraps(original)
    def _send_engine_dead(self: Any, *args: Any, **options: Any) -> Any:
        error = sys.exc_info()[1]
        if guard_thread is not None and isinstance(error, Exception):
            guard_thread.fail(f"rank {_rank} failed: its engine raised {type(error).__name__}: {error}")
        return original(self, *args, **options)

    return _send_engine_dead


def _workers() -> list[str]:
    parallel = getattr(getattr(_engine, "vllm_config", None), "parallel_config", None)
    return [f"worker of rank {_rank + number}" for number in range(int(getattr(parallel, "world_size", 1)))]
