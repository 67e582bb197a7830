"""Ranks for tests, forked after torch is imported, so that eight of them start in half a second.

If a rank raises, the test fails with its traceback. A rank that does not end is killed at the deadline.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def run_ranks(
    num_ranks: int, tmp_path: Path, run: Callable[[int, dist.Store], Any], deadline_s: float = 60
) -> list[Any]:
    """Call ``run(rank, store)`` in one process per rank. Returns the results by rank."""
    store_path = tmp_path / f"store-{time.monotonic_ns()}"
    results = [tmp_path / f"{store_path.name}-rank{rank}" for rank in range(num_ranks)]
    pids = [_fork(rank, num_ranks, store_path, results, run) for rank in range(num_ranks)]
    late = _wait(pids, results, deadline_s)
    outcomes = [pickle.loads(path.read_bytes()) for path in results]
    failures = [f"rank {rank}: {text}" for rank, (kind, text) in enumerate(outcomes) if kind != "returned"]
    assert not late, f"ranks {late} did not end within {deadline_s} s\n" + "\n".join(failures)
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


def _fork(
    rank: int, num_ranks: int, store_path: Path, results: list[Path], run: Callable[[int, dist.Store], Any]
) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    gc.disable()  # a collection would write to the pages that all ranks share, and so copy them
    code = 1
    try:
        torch.set_num_threads(1)
        outcome = ("returned", run(rank, dist.FileStore(str(store_path), num_ranks)))
        code = 0
    except BaseException:
        outcome = ("raised", traceback.format_exc())
    _write(results[rank], outcome)
    # a rank that exits while a peer still connects would make this peer fail
    while os.getppid() == parent and not all(path.exists() for path in results):
        time.sleep(0.005)
    os._exit(code)


def _write(path: Path, outcome: tuple[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(path)


def _wait(pids: list[int], results: list[Path], deadline_s: float) -> list[int]:
    """Reap every rank, and kill those that are late. Returns the late ranks.

    For a rank that left no result, one is written: the others wait for it before they exit.
    """
    deadline = time.monotonic() + deadline_s
    running = dict(enumerate(pids))
    late: list[int] = []
    try:
        while running:
            for rank, pid in list(running.items()):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del running[rank]
                    if not results[rank].exists():
                        _write(results[rank], ("lost", ""))
                elif time.monotonic() > deadline and rank not in late:
                    os.kill(pid, signal.SIGKILL)
                    late.append(rank)
            time.sleep(0.005)
    finally:
        for pid in running.values():  # the test was interrupted
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return late
