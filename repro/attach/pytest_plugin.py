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
    """The number that the marker gives, as a positional or a keyword argument. Raises TypeError for other arguments."""
    return int(n)


@functools.cache
def num_gpus() -> int:
    """The number of CUDA devices, counted once."""
    from repro.hosts.gpus import count_gpus

    return count_gpus()


@pytest.fixture
def ep_ranks(tmp_path: Path) -> Callable[..., Ranks]:
    """``ep_ranks(n, backend="gloo").run(function)`` calls ``function(rank)`` on n ranks under a watcher.

    Skips the test if ``backend="nccl"`` has fewer than n GPUs. ``quiet_window_s`` and ``deadline_s`` limit a run.
    """

    def make(num_ranks: int, backend: str = "gloo", quiet_window_s: float = 1.0, deadline_s: float = 60.0) -> Ranks:
        from repro.attach.harness import Ranks

        if num_ranks < 1:
            raise ValueError(f"ep_ranks({num_ranks}): at least 1 rank is needed to test anything")
        if backend not in ("gloo", "nccl"):
            raise ValueError(f"unknown backend {backend!r}; known: gloo, nccl")
        if backend == "nccl" and num_gpus() < num_ranks:
            pytest.skip(f"nccl needs a GPU for each of {num_ranks} ranks, {num_gpus()} found")
        return Ranks(num_ranks, backend, tmp_path, quiet_window_s, deadline_s)

    return make
