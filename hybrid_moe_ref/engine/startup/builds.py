"""Build compiled kernels in the phase `prepare`, before the first collective, on one rank of each host.

The first rank that gets the lock builds the kernels, and records heartbeats while it builds. The other ranks wait for
the lock, which names the rank that builds, and then load the result. Each rank stops waiting at a deadline. If one rank
has failed, all ranks stop.
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
from hybrid_moe_kernels.build_lock import BEAT_S, POLL_S, BuildLock, LockTimeout
from hybrid_moe_kernels.extension import BATON, BuildFailed, Extension, has_baton

from hybrid_moe_ref.files.holders import who_has_open
from hybrid_moe_ref.parallel.observer import Observer

DEADLINE_S = 900.0
"""Longest time in seconds for a build, or for the wait for a build."""

END_S = 3.0
"""Seconds to wait for an abandoned build to end. A build thread that runs even longer is left behind."""


@dataclass(frozen=True)
class BuildPlace:
    """The folder, rank and callbacks of a build.

    cache       folder of compiled extensions, shared by the ranks of a host
    observer    records that the rank waits for a lock or builds
    stopped_by  returns the message with which another rank stopped the job; "" while the job runs
    sum_up      sums each of some numbers over all ranks, by one all-reduce. All ranks must call it. Arguments: the
                numbers, and the name of the all-reduce in events
    deadline_s  longest time in seconds for a build, or for the wait for a build
    """

    cache: Path
    rank: int
    observer: Observer
    stopped_by: Callable[[], str] = lambda: ""
    sum_up: Callable[[list[int], str], list[int]] = lambda numbers, layer: numbers
    deadline_s: float = DEADLINE_S

    def check(self) -> None:
        """Raise ScheduleMismatch, as a collective would, if another rank has stopped the job."""
        if message := self.stopped_by():
            from hybrid_moe_ref.parallel.halt import ScheduleMismatch

            raise ScheduleMismatch(message)


class KernelBuilds:
    """The policy that decides when extensions are built: all of them before the first collective.

    `first_use` loads an extension that a forward pass needs and that is not loaded yet.
    """

    def prepare(self, extensions: Sequence[Extension], place: BuildPlace) -> None:
        """Build these extensions. The engine calls this on every rank, before the rank communicates.

        place: the cache folder, the rank and the callbacks of the builds
        """
        for extension in extensions:
            ensure(extension, place)

    def warm_up(self, run: Callable[[], None]) -> None:
        """Call `run`, which runs every kernel once. So kernels that compile at their first use compile now."""
        run()

    def first_use(self, extension: Extension, place: BuildPlace) -> None:
        """Load an extension at its first use, in the middle of a forward pass; build it first if necessary.

        place: the cache folder, the rank and the callbacks of the build
        """
        ensure(extension, place)


def ensure(extension: Extension, place: BuildPlace) -> None:
    """Load an extension. If it is not built yet, one rank of the host builds it first.

    place: the cache folder, the rank and the callbacks of the build

    Raises BuildFailed if the build fails, LockTimeout after `place.deadline_s` seconds, and ScheduleMismatch if another
    rank stopped the job. Each of these errors has a reason in one line.
    """
    if extension.is_loaded:
        return
    if not extension.is_built(place.cache):
        try:
            place.cache.mkdir(parents=True, exist_ok=True)
            _build_once(extension, place)
        except OSError as error:
            reason = error.strerror or error
            raise BuildFailed(
                f"cannot build in {place.cache}: {reason}; choose another folder with engine.cache_dir"
            ) from error
    if not extension.is_loaded:
        extension.load_built(place.cache)


def _build_once(extension: Extension, place: BuildPlace) -> None:
    folder = extension.folder(place.cache)
    lock = BuildLock(
        folder.with_name(f"{folder.name}.lock"), place.rank, place.deadline_s, place.observer.local, place.check
    )
    with lock:
        if not extension.is_built(place.cache):
            if has_baton():
                _clear_baton(folder, place, lock)
            try:
                _build(extension, place, lock)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise


def _build(extension: Extension, place: BuildPlace, lock: BuildLock) -> None:
    """Compile in a new thread. Meanwhile the calling thread records heartbeats.

    The calling thread ends the compiler if the build takes too long or another rank has stopped the job.
    """
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
    """Kill the processes that the build started: all children except ``others``.

    others    process ids of the children that existed before the build
    by_force  send SIGKILL instead of SIGTERM

    Call this without `by_force` first: at SIGTERM, ninja ends its compilers. At SIGKILL it cannot, so a compiler that
    ninja has just started, and that this function does not see yet, would continue to run.
    """
    for child in psutil.Process().children(recursive=True):
        if child.pid not in others:
            with contextlib.suppress(psutil.Error):
                child.kill() if by_force else child.terminate()


def _clear_baton(folder: Path, place: BuildPlace, lock: BuildLock) -> None:
    """Delete the extension loader's lock file ("baton") if the process that holds it has ended.

    torch itself never checks whether this process still runs. If it does, or if it is not visible from here, wait until
    the file is deleted. After ``place.deadline_s`` seconds, raise LockTimeout.

    lock: this project's own lock for the build, which this rank has. So the process that holds the baton is a program
    that does not use this lock
    """
    baton, started, last_beat = folder / BATON, time.monotonic(), 0.0
    while baton.exists():
        pid = who_has_open(baton)
        if pid == 0:
            baton.unlink(missing_ok=True)
            print(f"[rank {place.rank}] removed {baton}: its holder has ended", flush=True)
            return
        now = time.monotonic()
        if not last_beat:
            place.observer.local("lock_wait", str(baton), pid)
        if now - last_beat > BEAT_S:
            last_beat = now
            place.observer.local("heartbeat", f"waits for {baton}")
        lock.beat()
        place.check()
        if now - started > place.deadline_s:
            holder = f"pid {pid}, which is not a rank," if pid > 0 else "a process that is not visible from here"
            raise LockTimeout(f"{baton} has been held by {holder} for more than {now - started:.0f} s")
        time.sleep(POLL_S)
    if last_beat:
        place.observer.local("lock_freed", str(baton))
