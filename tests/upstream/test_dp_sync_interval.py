"""``dp_sync_interval`` must match across dp ranks, and offline nothing checks it: a difference hangs.

Each rank is one process with the real loop step of the EngineCore (`_has_global_unfinished_reqs`, `sync_dp_state`) and
the all-reduce of the step agreement, which the worker of the rank issues before.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.v1", reason="vLLM's CPU build is not installed: make test-vllm runs this")

from forked_ranks import run_ranks
from vllm.config import ParallelConfig
from vllm.v1.engine.core import DPEngineCoreProc

if not hasattr(ParallelConfig, "dp_sync_interval"):
    pytest.skip("before vLLM 0.32 the interval is a constant", allow_module_level=True)

STEPS = 20


def steps_of(intervals: tuple[int, int], rank: int) -> int | str:
    """Execute STEPS steps; return how many ended, and what ended the loop if they are fewer."""
    import torch
    import torch.distributed as dist

    agreements = dist.new_group(backend="gloo")
    engine = types.SimpleNamespace(
        step_counter=0, dp_sync_interval=intervals[rank], dp_group=dist.group.WORLD, pending_pause=False,
        ignore_start_dp_wave=False,
    )  # fmt: skip
    done = 0
    try:
        for _ in range(STEPS):
            dist.all_reduce(torch.zeros(4, 2, dtype=torch.int32), group=agreements)
            DPEngineCoreProc._has_global_unfinished_reqs(engine, True)
            done += 1
    except RuntimeError:
        return f"stopped after {done} steps"
    return done


def test_ranks_with_equal_intervals_go_on(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path / "store", lambda rank: steps_of((4, 4), rank), 30.0) == [STEPS, STEPS]


def test_ranks_with_different_intervals_stop_where_the_first_asks(tmp_path: Path) -> None:
    """Rank 0 waits in the question after its step 4. Rank 1 waits in the agreement of step 5. Neither times out by
    itself in a server, where the groups have no limit that matters."""
    stopped = run_ranks(2, tmp_path / "store", lambda rank: steps_of((4, 8), rank), 4.0)
    assert stopped == ["stopped after 3 steps", "stopped after 4 steps"]


def test_the_hash_that_online_ranks_compare_covers_the_interval() -> None:
    """So a difference is found online, but only once all engines are up (EngineCoreProc.__init__ sends it last)."""
    assert ParallelConfig(dp_sync_interval=4).compute_hash() != ParallelConfig(dp_sync_interval=8).compute_hash()


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="offline, dp ranks do not compare their configurations (vLLM 0.32)"
)
def test_a_difference_is_refused_when_the_engines_meet(tmp_path: Path) -> None:
    def meet(rank: int) -> str:
        parallel: Any = ParallelConfig(
            data_parallel_size=2, data_parallel_rank=rank, data_parallel_rank_local=rank, dp_sync_interval=(4, 8)[rank]
        )
        parallel.stateless_init_dp_group = lambda return_store: (None, None)
        engine = types.SimpleNamespace(dp_sync_interval=parallel.dp_sync_interval)
        DPEngineCoreProc._init_data_parallel(engine, types.SimpleNamespace(parallel_config=parallel))
        return "accepted"

    assert all("dp_sync_interval" in answer for answer in run_ranks(2, tmp_path / "store", meet, 10.0))
