"""Hooks for vLLM's front end: the process that starts the engine, sends it requests, and gets the outputs.

The hooks write what the front end does into a small file (the notes file). In offline use (class LLM), each rank has a
front end: the process that created the LLM. In a server, one API process is the front end of several engines; the name
of its notes file contains the rank of the first of these engines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import wraps
from multiprocessing import util
from typing import Any

from repro.attach.record import rank as this
from repro.attach.vllm.harmless import Harmless
from repro.attach.vllm.processes.engine import first_worker
from repro.attach.vllm.processes.notes import FRONT, Activity, Note, Notes, create

current: Notes | None = None
"""The notes file of this process, which is a front end; None if it is not."""

_owner_pid = 0


def after_fork() -> None:
    """Reset the state in a forked child, which is not the front end."""
    global current
    current = None


def begin(config: Any) -> None:
    """If the server has several data-parallel ranks, create the file in which this front end notes what it does.

    config: vLLM's ParallelConfig
    """
    global current, _owner_pid
    if _owner_pid == os.getpid():
        return
    _owner_pid = os.getpid()
    # FileExistsError: the rank already has a front end
    with Harmless("the front end of this rank"), contextlib.suppress(FileExistsError):
        if int(config.data_parallel_size) <= 1:
            return
        current = create(this.folder(config.world_size_across_dp), first_worker(config), FRONT)
        # multiprocessing calls this at the end of a program, and of its own children, before it waits for the engine.
        util.Finalize(None, _exiting, exitpriority=100)


def _exiting() -> None:
    if current is not None and _owner_pid == os.getpid():
        current[Note.ACTIVITY] = Activity.EXITS


def starting(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap MPClient.__init__, to note that the front end starts the engine and waits until the engine is ready."""

    @wraps(original)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        configs = (getattr(each, "parallel_config", None) for each in (*args, *options.values()))
        config = next((each for each in configs if each is not None), None)
        if config is not None:
            begin(config)
        with _activity(Activity.STARTS_ENGINE):
            original(self, *args, **options)

    return __init__


def receiving(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap SyncMPClient.get_output, to note that the front end waits for outputs."""

    @wraps(original)
    def get_output(self: Any, *args: Any, **options: Any) -> Any:
        with _activity(Activity.WAITS_FOR_OUTPUTS):
            return original(self, *args, **options)

    return get_output


class _activity:
    """A ``with`` block that notes what this front end does within the block, such as that it waits for outputs."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity

    def __enter__(self) -> None:
        if current is not None:
            current[Note.ACTIVITY] = self._activity

    def __exit__(self, *_: object) -> None:
        if current is not None:
            current[Note.ACTIVITY] = Activity.WORKS
