"""What holds for all tests: their environment, and what is compiled once for them."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import environment
import pytest
from hypothesis import HealthCheck, settings

HOME, BUILD = pytest.StashKey[str](), pytest.StashKey[Any]()


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module, and so torch, is imported. Workers share the home, and so what is compiled."""
    if worker_of(config):
        home = os.environ["HOME"]  # of the process that started the workers
        atexit.register(os._exit, 0)  # runs last, and saves the second that tearing down torch's modules takes
    else:
        config.stash[HOME] = home = tempfile.mkdtemp(prefix="home-of-tests-")
    environment.settle(home)
    # the same examples in every run, and no limit on their time, because a test must not fail on a busy machine
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("repeatable")


def worker_of(config: pytest.Config) -> str:
    """Return the name of this process if pytest-xdist runs the tests in several ones; else ""."""
    return str(getattr(config, "workerinput", {}).get("workerid", ""))


def pytest_unconfigure(config: pytest.Config) -> None:
    if build := config.stash.get(BUILD, None):
        build.end()
    if home := config.stash.get(HOME, ""):
        shutil.rmtree(home, ignore_errors=True)
    gc.unfreeze()  # so that the interpreter frees them at its end: triton reports frozen objects as leaks


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Spare the garbage collector the modules and tests, which are no garbage: looking through them takes time, and
    makes ranks copy their pages."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the native library run last, while it is built beside the others; the first of them may wait for it."""
    items.sort(key=needs_native_library)
    for first in filter(needs_native_library, items):
        from hybrid_moe_kernels import native

        first.add_marker(pytest.mark.timeout(native.LOCK_LIMIT_S + 60))
        break


def needs_native_library(item: pytest.Item) -> bool:
    return "native_library" in getattr(item, "fixturenames", ())


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the build."""
    config = session.config
    builds = worker_of(config) in ("", "gw0") and not config.option.collectonly
    if builds and any(map(needs_native_library, session.items)):
        from hybrid_moe_kernels import native
        from native_build import NativeBuild

        if not native.cannot_build():
            config.stash[BUILD] = NativeBuild()


@pytest.fixture
def without_nohup() -> Iterator[None]:
    """SIGHUP as a terminal gives it: nohup and some build servers have it ignored, and so commands leave it alone."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def native_library() -> Any:
    """The loaded library of native kernels; skips on a machine that cannot compile, and fails where a build does."""
    from hybrid_moe_kernels import native

    if lack := native.cannot_build():
        pytest.skip(f"native kernels: {lack}")
    if error := native.prepare():
        pytest.fail(f"native kernels: {error}")
    return native.library()


@pytest.fixture(scope="session")
def programs() -> Iterator[Any]:
    """A process that has imported torch, and runs programs in forks of it."""
    from program_server import ProgramServer

    server = ProgramServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def cold_run() -> Iterator[tuple[Any, ...]]:
    """The one run that compiles: its directory, verdict, notices and cache, which is the warm one of the others."""
    from building import compiling_run

    run_dir, document, noticed, cache = compiling_run(Path(os.environ["HOME"], "cold_run"))
    os.environ["HMR_KERNEL_CACHE"] = str(cache)
    yield run_dir, document, noticed, cache
    del os.environ["HMR_KERNEL_CACHE"]
