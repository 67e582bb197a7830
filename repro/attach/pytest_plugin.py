"""The pytest plugin of :mod:`repro.testing`: the fixture ``ep_ranks`` and the marker ``requires_gpus(n)``.

pytest loads it in every run of an environment that has this package, so it imports nothing heavy until it is used.
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
    """Return the n of the marker ``requires_gpus(n)``. Python raises TypeError if the marker has other arguments."""
    return int(n)


@functools.cache
def num_gpus() -> int:
    """Return the number of CUDA devices. Only the first call counts them."""
    from repro.hosts.gpus import count_gpus

    return count_gpus()


@pytest.fixture
def ep_ranks(tmp_path: Path) -> Callable[..., Ranks]:
    """Return a function that makes ranks: ``ep_ranks(n, backend="gloo").run(function)`` calls ``function(rank)`` on n
    ranks.

    A watcher follows the ranks. Optional arguments: after ``quiet_window_s`` seconds without an event on any rank, the
    ranks are judged; ``deadline_s`` is the longest time of a run, in seconds. With ``backend="nccl"`` the test is
    skipped if there are fewer than n GPUs.
    """

    def make(num_ranks: int, backend: str = "gloo", quiet_window_s: float = 1.0, deadline_s: float = 60.0) -> Ranks:
        from repro.attach.harness import Ranks

        if num_ranks < 1:
            raise ValueError(f"ep_ranks({num_ranks}): the number of ranks must be at least 1")
        if backend not in ("gloo", "nccl"):
            raise ValueError(f"unknown backend {backend!r}; known: gloo, nccl")
        if backend == "nccl" and num_gpus() < num_ranks:
            pytest.skip(f'backend "nccl" needs a GPU for each of {num_ranks} ranks, but {num_gpus()} were found')
        return Ranks(num_ranks, backend, tmp_path, quiet_window_s, deadline_s)

    return make
