"""The pytest plugin of :mod:`repro.testing`: the fixture ``ep_ranks`` and the marker ``requires_gpus(n)``.

If this package is installed, pytest loads this plugin in every run, also for tests that do not use it. So the plugin
imports its large modules only when a test uses the fixture or the marker.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from repro.attach.harness import Ranks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires_gpus(n): skipped where fewer than n CUDA devices are found")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("requires_gpus"):
        required = _required_gpus(*marker.args, **marker.kwargs)
        if num_gpus() < required:
            pytest.skip(f"needs {required} GPUs, {num_gpus()} found")


def _required_gpus(n: int = 1) -> int:
    """Return how many GPUs the marker ``requires_gpus(n)`` requires; 1 if the marker has no argument.

    Call this with the arguments of the marker. If they are not just the number n, Python raises TypeError.
    """
    return int(n)


@functools.cache
def num_gpus() -> int:
    """Return the number of CUDA devices. The first call counts them; later calls return the same number."""
    from repro.hosts.gpus import count_gpus

    return count_gpus()


@pytest.fixture
def ep_ranks(tmp_path: Path) -> Callable[..., Ranks]:
    """Return a function that makes the ranks of a test: ``ep_ranks(4, "gloo").run(function)``.

    ``run`` starts the ranks, calls ``function(rank)`` in each of them, and watches them. The arguments of ``ep_ranks``:

    num_ranks       the number of ranks, at least 1
    backend         "gloo" or "nccl"; with "nccl", the test is skipped if there are fewer GPUs than ranks
    quiet_window_s  the ranks are judged when no rank has recorded an event for this many seconds
    deadline_s      after this many seconds the test fails if a rank is not done
    """

    def make(num_ranks: int, backend: str = "gloo", quiet_window_s: float = 1.0, deadline_s: float = 60.0) -> Ranks:
        from repro.attach.harness import Ranks

        if num_ranks < 1:
            raise ValueError(f"ep_ranks({num_ranks}): the number of ranks must be at least 1")
        if backend not in ("gloo", "nccl"):
            raise ValueError(f"ep_ranks: unknown backend {backend!r}; give gloo or nccl")
        if backend == "nccl" and num_gpus() < num_ranks:
            pytest.skip(f'backend "nccl" needs a GPU for each of {num_ranks} ranks, but {num_gpus()} were found')
        return Ranks(num_ranks, backend, tmp_path, quiet_window_s, deadline_s)

    return make
