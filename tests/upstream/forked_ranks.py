"""Run a function in forked processes that are ranks of torch.distributed over gloo, each with a bounded life."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0


def run_ranks(num_ranks: int, store: Path, function: Callable[[int], Any], timeout_s: float) -> list[Any]:
    """Return what ``function(rank)`` returns on each rank; an exception is returned as its text.

    timeout_s: after which a collective that some rank does not join raises
    """
    context = multiprocessing.get_context("fork")  # the parent has imported vLLM, which takes long
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, store, function, timeout_s, results), daemon=True)
        for rank in range(num_ranks)
    ]
    for each in ranks:
        each.start()
    try:
        found = dict(results.get(timeout=PATIENCE_S) for _ in ranks)
    finally:
        for each in ranks:
            each.kill()
            each.join()
    return [found[rank] for rank in range(num_ranks)]


def _rank(
    rank: int, num_ranks: int, store: Path, function: Callable[[int], Any], timeout_s: float, results: Any
) -> None:
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks,
            timeout=datetime.timedelta(seconds=timeout_s),
        )  # fmt: skip
        results.put((rank, function(rank)))
    except Exception as error:
        traceback.print_exc()
        results.put((rank, f"{type(error).__name__}: {error}"))
    results.close()
    results.join_thread()
