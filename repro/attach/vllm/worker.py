"""Hooks for a vLLM worker, which is a rank. They record phases, steps with their agreement, layers and group names.

If vLLM compiles the model, Dynamo traces some of the replaced methods. The hooks of these methods do nothing while
torch compiles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.attach.record import compiled
from repro.attach.record import rank as this
from repro.attach.record.groups import describe
from repro.attach.vllm import dynamo
from repro.attach.vllm.habits import Habits
from repro.attach.vllm.harmless import Harmless
from repro.attach.vllm.processes import engine
from repro.attach.vllm.processes.mirror import Mirror
from repro.attach.vllm.processes.notes import Activity, Note
from repro.attach.vllm.progress import make_progress

AGREEMENT = "step"
"""The layer under which the step agreement (C1) is recorded; this project's engine uses the same name."""


class Worker:
    """What the recorder knows of this vLLM worker: its current phase and step, and the schedules learned from it."""

    def __init__(self, rank: this.Rank, config: Any) -> None:
        self.rank = rank
        self.progress = make_progress()
        self.habits = Habits(rank.recorder, self.progress)
        if (tape := getattr(rank.recorder, "tape", None)) is not None:
            tape.progress = self.progress  # the compiled hook of the step agreement finds it there
        self.mirror: Mirror | None = None
        size = int(config.world_size)
        if int(config.data_parallel_size) > 1 and rank.rank % size == 0:
            first_workers = range(0, int(config.world_size_across_dp), size)
            self.mirror = Mirror(rank, self.progress, self.habits, first_workers)
            rank.attended.append(self._note_idle)

    def phase(self, name: str) -> None:
        if name != self.progress.phase:
            self.progress.phase = name
            with self.rank.lock:
                self.habits.end()
                self.rank.recorder.phase(name)

    def begin_execution(self, num_live: int) -> None:
        progress = self.progress
        if progress.phase != "serve":
            self.phase("serve")
        progress.live, progress.executing, progress.begun = num_live, True, False
        if engine.current is not None:  # the engine runs in this process
            engine.note_request()

    def begin_step(self) -> bool:
        """Begin a step, unless this execution has already begun its step. Returns whether a step was begun.

        Call this before a step agreement. An agreement outside an execution always begins a step.
        """
        progress = self.progress
        if progress.executing and progress.begun:
            return False
        progress.begun = True
        progress.step += 1
        with self.rank.lock:
            self._declare(self.habits.begin())
        return True

    def agreed(self, key: tuple[Any, ...]) -> None:
        """Record the schedule of the rest of the step, if the recorder has learned it.

        key: the microbatches and the graph mode on which the ranks have just agreed; they decide the schedule, see
        `_agreed_key`
        """
        with self.rank.lock:
            plan = self.habits.plan((self.progress.phase, *key))
            if plan:
                self._declare(plan)

    def _declare(self, schedule: Sequence[ScheduleEntry]) -> None:
        progress = self.progress
        self.rank.recorder.begin_step(progress.step, schedule, progress.live if progress.executing else 0)

    def _note_idle(self) -> None:
        if self.mirror is not None:
            with self.rank.lock:
                self.mirror.note_idle()


current: Worker | None = None
"""The worker that this process is; None if it is not a worker."""


def after_fork() -> None:
    """Reset the state in a forked child, which is not the worker."""
    global current
    current = None


# -- start and phases ------------------------------------------------------------------------------------------------


def initialising(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.init_device, to record steps and phases as soon as it has returned: then the process is a rank."""

    @wraps(original)
    def init_device(self: Any, *args: Any, **options: Any) -> Any:
        global current
        result = original(self, *args, **options)
        if this.current is not None and current is None:
            with Harmless("steps and phases of this rank"):
                current = Worker(this.current, self.vllm_config.parallel_config)
        return result

    return init_device


def in_phase(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for a method that is one phase of the start, to record when this phase begins and ends.

    name: the name of the phase
    """

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def method(self: Any, *args: Any, **options: Any) -> Any:
            worker = current
            if worker is None:
                return original(self, *args, **options)
            outer = worker.progress.phase
            worker.phase(name)
            try:
                result = original(self, *args, **options)
            except Exception as error:  # vLLM catches it, so it would not be recorded as the rank's end
                this.failed(error)
                raise
            worker.phase(outer or "start")
            return result

        return method

    return hook


def ending(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap WorkerProc.shutdown, to record that the rank ends normally.

    The engine kills the worker some seconds later, and this must not count as a crash.
    """

    @wraps(original)
    def shutdown(self: Any, *args: Any, **options: Any) -> Any:
        this.done()
        return original(self, *args, **options)

    return shutdown


# -- steps -----------------------------------------------------------------------------------------------------------


def executing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.execute_model, to record the phase `serve`, and how many requests this rank has in the step.

    For a call without scheduled tokens, which does not run the model, the wrapper records nothing.
    """

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **options: Any) -> Any:
        worker = current
        if worker is None or not getattr(scheduler_output, "total_num_scheduled_tokens", 1):
            return original(self, scheduler_output, *args, **options)
        live = getattr(scheduler_output, "num_scheduled_tokens", None)
        worker.begin_execution(len(live) if isinstance(live, dict) else 1)
        try:
            return original(self, scheduler_output, *args, **options)
        except Exception as error:
            this.failed(error)
            raise
        finally:
            worker.progress.executing = False

    return execute_model


def executing_dummy(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.execute_dummy_batch, to record the phase `serve`, and that this rank has no requests in the step."""

    @wraps(original)
    def execute_dummy_batch(self: Any, *args: Any, **options: Any) -> Any:
        worker = current
        if worker is None:
            return original(self, *args, **options)
        worker.begin_execution(0)
        try:
            return original(self, *args, **options)
        except Exception as error:
            this.failed(error)
            raise
        finally:
            worker.progress.executing = False

    return execute_dummy_batch


def agreeing(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap dp_utils._run_ar (the step agreement), to record that a step begins, and the step's schedule if it is known.

    The all-reduce of the agreement is recorded like any other collective of torch. torch.compile does not trace this
    function: vLLM calls it before the forward pass.
    """
    declaring, run = Harmless("what a rank declares after a step agreement"), _within()

    def declare(rows: Any) -> None:
        try:
            if current is not None:
                current.agreed(_agreed_key(rows))
        except Exception as error:
            declaring.report(error)

    @wraps(original)
    def _run_ar(*args: Any, **options: Any) -> Any:
        worker = current
        if worker is None:
            return original(*args, **options)
        if not worker.begin_step():
            return run(worker.rank.local.layer or AGREEMENT, original, *args, **options)
        rows = run(AGREEMENT, original, *args, **options)
        declare(rows)
        return rows

    library: Any = compiled.load()
    return _run_ar if library is None else library.Agreement(original, _run_ar, declare, AGREEMENT)


def _agreed_key(rows: Any) -> tuple[Any, ...]:
    """Return (microbatches, graph mode) of a step, which decide its schedule: each is the smallest value of any rank.

    rows: the result of the step agreement, int32[4, ranks]. For another number of rows, or for a tensor on a GPU, this
    function returns (). The compiled hook reads the rows in the same way.
    """
    if not rows.is_cpu or len(rows) != 4:
        return ()
    *_, microbatch, mode = rows.tolist()
    return min(microbatch), min(mode)


# -- groups and layers -------------------------------------------------------------------------------------------------


def naming(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap GroupCoordinator.__init__ and DeviceCommunicatorBase.__init__, to record vLLM's names of the groups.

    vLLM does not tell torch these names.
    """

    @wraps(original)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        with Harmless("vLLM's name of a group"):
            name = str(getattr(self, "unique_name", "") or "").partition(":")[0]
            if name:
                describe(getattr(self, "device_group", None), name)
                describe(getattr(self, "cpu_group", None), f"{name}.cpu")

    return __init__


def in_layer(attribute: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for a layer's method, to record the layer of each collective.

    attribute: the attribute in which the layer has its name
    """

    run = _within()

    def hook(original: Callable[..., Any]) -> Callable[..., Any]:
        is_tracing = dynamo.tracing_test()

        @wraps(original)
        def forward(self: Any, *args: Any, **options: Any) -> Any:
            if current is None or is_tracing():
                return original(self, *args, **options)
            return run(str(getattr(self, attribute, "")), original, self, *args, **options)

        return forward

    return hook


def _within() -> Callable[..., Any]:
    """Return the function `_run_within`, or the same function of the compiled library if this library exists."""
    library: Any = compiled.load()
    return _run_within if library is None else library.within


def _run_within(layer: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call the function, and record the name of the layer with each collective that the function issues."""
    assert current is not None
    local = current.rank.local
    outer, local.layer = local.layer, layer
    try:
        return function(*args, **options)
    finally:
        local.layer = outer


# -- waiting for the other process of the rank -----------------------------------------------------------------------


def receiving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap MessageQueue.dequeue, by which engine and worker receive messages from each other, to record who waits.

    The record shows an engine that waits for its worker, and an idle worker that waits for its engine.
    """

    @wraps(original)
    def dequeue(self: Any, *args: Any, **options: Any) -> Any:
        if engine.current is not None:
            return _await_worker(original, self, *args, **options)
        worker = current
        if worker is None or worker.mirror is None or not options.get("indefinite"):
            return original(self, *args, **options)
        worker.mirror.since_ns = time.monotonic_ns()
        try:
            return original(self, *args, **options)
        finally:
            with worker.rank.lock:
                worker.mirror.woken()

    return dequeue


def _await_worker(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
    notes = engine.current
    assert notes is not None
    notes[Note.ACTIVITY] = Activity.WAITS_FOR_WORKER
    try:
        return original(*args, **options)
    finally:
        notes[Note.ACTIVITY] = Activity.WORKS
