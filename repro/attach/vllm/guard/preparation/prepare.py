"""Build the kernels that the first step would build, before the ranks wait for each other in that step.

On each host one rank builds, and the other ranks wait for its build lock. The lock names the rank that builds, shows
that this rank is alive, and has a deadline. Then each rank waits until all ranks have finished. If a build raises
ImportError or AttributeError, the rank prints the exception and goes on. Any other exception stops all ranks at once.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repro.attach.vllm.guard import worker
from repro.attach.vllm.guard.ending.stop import Refused
from repro.attach.vllm.guard.meeting.vote import decide
from repro.attach.vllm.guard.preparation.builders import Builder, chosen
from repro.attach.vllm.guard.schedule.entry import digest_of
from repro.attach.vllm.guard.schedule.guard import Guard

if TYPE_CHECKING:
    from hybrid_moe_kernels.build_lock import BuildLock

DEADLINE_S = 1800.0
"""For how many seconds a rank waits for a build of another rank, unless HMR_GUARD_BUILD_DEADLINE is set."""

SAY_S = 5.0
"""A rank that waits for the build lock prints a line each time that this many seconds have passed."""


def loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.load_model, to build kernels directly after it. The model then exists, and has not run yet."""

    @wraps(original)
    def load_model(self: Any, *args: Any, **options: Any) -> Any:
        result = original(self, *args, **options)
        if worker.current is not None:
            worker.guarded(prepare, worker.current, getattr(getattr(self, "model_runner", None), "model", None))
        return result

    return load_model


def prepare(guard: Guard, model: Any) -> None:
    """Build the kernels that the model needs, then wait until all ranks have built theirs.

    Raises Refused if a build failed on a rank, or if a rank did not finish in time. With HMR_GUARD=observe, only prints
    what would be built.

    guard: the guard of this worker; model: the torch.nn.Module of this rank, None if it is not known
    """
    stop, began_s = guard.stop, time.monotonic()
    deadline_s = float(os.environ.get("HMR_GUARD_BUILD_DEADLINE") or DEADLINE_S)
    builders: list[Builder] = []
    try:
        builders = list(chosen(model))
        if not stop.agrees:
            for builder in builders:
                stop.say(f"prepare: would build {builder.name} before the first execution")
            return
        for builder in builders:
            _build(builder, guard, deadline_s)
    except Refused:
        raise
    except Exception as error:
        guard.refuse(f"rank {guard.rank} could not prepare: {type(error).__name__}: {error}{_advice(error)}")
    names = [builder.name for builder in builders]
    sentence = decide(
        guard.meeting, "prepare", {"builds": names}, guard.rank, guard.num_ranks, deadline_s, lambda _: "",
        guard.raise_if_stopped,
    )  # fmt: skip
    if sentence:
        guard.refuse(f"not all ranks are prepared: {sentence}")
    stop.say(f"prepare: all ranks are ready after {time.monotonic() - began_s:.1f} s; built: {', '.join(names) or '-'}")


def _build(builder: Builder, guard: Guard, deadline_s: float) -> None:
    from hybrid_moe_kernels.build_lock import BEAT_S, BuildLock, every

    waiting = _Waiting(builder, guard)
    lock = BuildLock(_lock_of(builder), guard.rank, deadline_s, check=waiting.check)
    waiting.lock = lock
    with lock:
        began_s = time.monotonic()
        guard.stop.say(f"prepare: this rank builds or loads {builder.name}")
        with every(BEAT_S, lock.beat):
            try:
                builder.build()
            except (ImportError, AttributeError) as error:
                guard.stop.say(f"prepare: {builder.name} is not prepared: {type(error).__name__}: {error}")
                return
        guard.stop.say(f"prepare: {builder.name} is ready after {time.monotonic() - began_s:.1f} s")


class _Waiting:
    """The wait of a rank for the build lock.

    `check` prints from time to time that the rank waits, and raises Refused if the ranks have been stopped.
    """

    def __init__(self, builder: Builder, guard: Guard) -> None:
        self.lock: BuildLock | None = None
        self._builder = builder
        self._guard = guard
        self._since_s = time.monotonic()
        self._said_s = 0.0

    def check(self) -> None:
        self._guard.raise_if_stopped()
        waited_s = time.monotonic() - self._since_s
        if waited_s - self._said_s < SAY_S and self._said_s:
            return
        holder = self.lock.holder() if self.lock is not None else None
        if holder is None and waited_s < 1:  # the holder has not written its name yet
            return
        self._said_s = max(waited_s, 0.001)
        who = holder.words() if holder is not None else "another process"
        self._guard.stop.say(f"prepare: this rank waits for the build lock of {self._builder.name}, held by {who}")


def _lock_of(builder: Builder) -> Path:
    """Return the path of the build lock of a builder. All processes of this user on this host have the same path."""
    folder = Path(tempfile.gettempdir()) / f"hmr-guard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{digest_of(builder.name):016x}.lock"


def _advice(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOSPC,
    ):
        return ": name a folder that every rank can write to (TORCH_EXTENSIONS_DIR, FLASHINFER_WORKSPACE_BASE, TMPDIR)"
    return ""
