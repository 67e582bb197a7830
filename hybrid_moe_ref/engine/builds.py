"""How a rank comes by its compiled kernels: in `prepare`, before the first collective, built by one rank of a host.

The leader is who gets the lock first. It builds while it gives signs of life; the others wait for the lock, which
names it, and load what it built. Nobody waits beyond a deadline, and all stop when one rank has failed.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from hybrid_moe_kernels.extension import BATON, BuildFailed, Extension

from hybrid_moe_ref.engine.build_lock import BEAT_S, POLL_S, BuildLock, LockTimeout
from hybrid_moe_ref.open_files import who_has_open
from hybrid_moe_ref.parallel.observer import Observer

DEADLINE_S = 900.0
"""How long a build, or the wait for one, may take."""

END_S = 3.0
"""How long a build that is given up may take to end. A thread that hangs without a compiler is left behind."""


@dataclass(frozen=True)
class BuildPlace:
    """Where and for whom a rank builds.

    cache     folder of compiled modules, shared by the ranks of a host
    heard     the message with which another rank stopped the job, "" while none did
    sum_up    sums numbers over the dp ranks: one all-reduce, which all must join; (numbers, layer) -> sums
    """

    cache: Path
    rank: int
    observer: Observer
    heard: Callable[[], str] = lambda: ""
    sum_up: Callable[[list[int], str], list[int]] = lambda numbers, layer: numbers
    deadline_s: float = DEADLINE_S

    def check(self) -> None:
        """Raises ScheduleMismatch, as a collective would, when another rank has stopped the job."""
        if message := self.heard():
            from hybrid_moe_ref.parallel.guard import ScheduleMismatch

            raise ScheduleMismatch(message)


class KernelBuilds:
    """When and by whom modules are built: all before the first collective. `first_use` is what a forward pass meets
    that needs a module which `prepare` was not told of.
    """

    def prepare(self, extensions: Sequence[Extension], place: BuildPlace) -> None:
        """Called on every rank at the same point of its start, before it communicates."""
        for extension in extensions:
            ensure(extension, place)

    def warm_up(self, run: Callable[[], None]) -> None:
        """Called after `prepare`: use everything once, so that what else is compiled at its first use is compiled."""
        run()

    def first_use(self, extension: Extension, place: BuildPlace) -> None:
        """Load a module in the middle of a forward pass."""
        ensure(extension, place)


def ensure(extension: Extension, place: BuildPlace) -> None:
    """Load a module, which one rank of the host builds if nobody has before.

    Raises BuildFailed, LockTimeout, or ScheduleMismatch when another rank stopped the job; each says why in one line.
    """
    if extension.is_loaded:
        return
    if not extension.is_built(place.cache):
        try:
            place.cache.mkdir(parents=True, exist_ok=True)
            _build_once(extension, place)
        except OSError as error:
            told = f"cannot build in {place.cache}: {error.strerror or error}; name another folder (engine.cache_dir)"
            raise BuildFailed(told) from error
    if not extension.is_loaded:
        extension.load_built(place.cache)


def _build_once(extension: Extension, place: BuildPlace) -> None:
    folder = extension.folder(place.cache)
    lock = BuildLock(
        folder.with_name(f"{folder.name}.lock"), place.rank, place.deadline_s, place.observer.local, place.check
    )
    with lock:
        if not extension.is_built(place.cache):
            _clear_baton(folder, place, lock)
            try:
                _build(extension, place, lock)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise


def _build(extension: Extension, place: BuildPlace, lock: BuildLock) -> None:
    """Compile in a thread, so that this one can give signs of life, and end the compiler when it must."""
    outcome: list[BaseException | None] = []

    def build() -> None:
        try:
            extension.load(place.cache, place.observer.local)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    others = {child.pid for child in psutil.Process().children(recursive=True)}
    started = time.monotonic()
    thread = threading.Thread(target=build, name=f"build {extension.name}", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(POLL_S)
            lock.beat()
            place.observer.local("heartbeat", f"builds {extension.name}")
            place.check()
            if time.monotonic() - started > place.deadline_s:
                raise LockTimeout(f"{extension.name} was not built within {place.deadline_s:g} s")
    finally:
        given_up = time.monotonic()
        while thread.is_alive() and time.monotonic() - given_up < END_S:
            _end_children_but(others, by_force=time.monotonic() - given_up > END_S / 3)
            thread.join(POLL_S)
    if outcome[0] is not None:
        raise outcome[0]


def _end_children_but(others: set[int], by_force: bool) -> None:
    """End what the build started: this process does nothing else meanwhile.

    Not by force at first: ninja that is asked to end takes the compiler with it that it started a moment ago, which is
    not seen here yet, and which nobody would find once ninja is gone.
    """
    for child in psutil.Process().children(recursive=True):
        if child.pid not in others:
            with contextlib.suppress(psutil.Error):
                child.kill() if by_force else child.terminate()


def _clear_baton(folder: Path, place: BuildPlace, lock: BuildLock) -> None:
    """Remove the extension loader's own lock file if its holder is gone, which torch's waiters would never notice.

    A live holder is somebody who does not use our lock; it is waited for, within the deadline.
    """
    baton, started, beaten = folder / BATON, time.monotonic(), 0.0
    while baton.exists():
        pid = who_has_open(baton)
        if pid == 0:
            baton.unlink(missing_ok=True)
            print(f"[rank {place.rank}] removed {baton}: its holder is gone", flush=True)
            return
        now = time.monotonic()
        if not beaten:
            place.observer.local("lock_wait", str(baton), pid)
        if now - beaten > BEAT_S:
            beaten = now
            place.observer.local("heartbeat", f"waits for {baton}")
        lock.beat()
        place.check()
        if now - started > place.deadline_s:
            who = f"by pid {pid}, which is no rank," if pid > 0 else "by a process that cannot be found from here"
            raise LockTimeout(f"{baton} is held {who} for more than {now - started:.0f} s")
        time.sleep(POLL_S)
    if beaten:
        place.observer.local("lock_freed", str(baton))
