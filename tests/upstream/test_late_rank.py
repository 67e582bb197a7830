"""A rank that is late at the start is named by nobody: the others wait in the step agreement, and the log is silent.

The real `_run_ar` of vLLM, in two processes; rank 1 comes late, as one does that builds a kernel first.
"""

from __future__ import annotations

import logging
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vLLM's CPU build is not installed: make test-vllm runs this")

from forked_ranks import run_ranks
from vllm.v1.worker import dp_utils

LATE_S = 3.0


def agree(rank: int, late_s: float) -> tuple[list[list[int]], list[str]]:
    """Run one step agreement; return its rows, and the lines that vLLM logged meanwhile."""
    import torch.distributed as dist

    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("vllm").addHandler(Handler())
    group = types.SimpleNamespace(device="cpu", device_group=dist.group.WORLD, cpu_group=dist.group.WORLD)
    dp_utils.get_dp_group = lambda: group
    config = types.SimpleNamespace(
        data_parallel_size=2, data_parallel_rank=rank, disable_nccl_for_dp_synchronization=True
    )
    if rank == 1:
        time.sleep(late_s)
    return dp_utils._run_ar(False, 8 + rank, 8 + rank, 0, config).tolist(), lines


def test_the_step_agreement_has_a_column_for_each_rank(tmp_path: Path) -> None:
    for rows, _ in run_ranks(2, tmp_path / "store", lambda rank: agree(rank, 0.0), 30.0):
        assert rows == [[8, 9], [8, 9], [0, 0], [0, 0]]


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="no rank says for which ranks it waits (vLLM 0.32)")
def test_a_rank_that_waits_says_for_which_rank(tmp_path: Path) -> None:
    (_, lines), _ = run_ranks(2, tmp_path / "store", lambda rank: agree(rank, LATE_S), 30.0)
    assert any("rank 1" in line for line in lines)
