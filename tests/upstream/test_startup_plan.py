"""vLLM's start-up plan with data parallelism (v1/worker/startup_plan.py): one plan file is shared by all dp ranks.

The tests that expect the cure are marked xfail(strict): once vLLM has it, they fail here and the mark goes.
"""

from __future__ import annotations

import contextlib
import types
from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vLLM's CPU build is not installed: make test-vllm runs this")
startup_plan = pytest.importorskip("vllm.v1.worker.startup_plan", reason="this vLLM has no start-up plan")

from vllm.config import CUDAGraphMode, ParallelConfig, VllmConfig  # noqa: E402
from vllm.v1.worker import gpu_worker  # noqa: E402

GIB = 1 << 30
DP_SIZE = 2


def worker_of(dp_rank: int, free_gib: float) -> types.SimpleNamespace:
    """A GPU worker of a dp rank with TP1, with what the plan reads of it. Its ``rank`` is 0 on each dp rank."""
    parallel = ParallelConfig(data_parallel_size=DP_SIZE, data_parallel_rank=dp_rank, data_parallel_rank_local=dp_rank)
    config = VllmConfig(parallel_config=parallel)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    return types.SimpleNamespace(
        vllm_config=config,
        parallel_config=parallel,
        cache_config=types.SimpleNamespace(kv_cache_memory_bytes=None),
        rank=parallel.rank,
        init_snapshot=types.SimpleNamespace(free_memory=int(free_gib * GIB)),
    )


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the plans. The device has a name and a size on every machine."""
    monkeypatch.setenv("VLLM_ENABLE_STARTUP_PLAN", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    platform = types.SimpleNamespace(
        get_device_capability=lambda: (9, 0), get_device_name=lambda: "H200", get_device_total_memory=lambda: 141 * GIB
    )
    monkeypatch.setattr(startup_plan, "current_platform", platform)
    return tmp_path / "startup_plan"


def fingerprint_of(worker: types.SimpleNamespace) -> str:
    return startup_plan.compute_plan_fingerprint(worker.vllm_config, worker.rank, worker.parallel_config.world_size)


def first_start(*workers: types.SimpleNamespace) -> None:
    """The workers have profiled, and save their plans in this order."""
    for worker in workers:
        startup_plan.maybe_save_startup_plan(worker, 90 * GIB)


def applies(worker: types.SimpleNamespace) -> bool:
    """Whether a worker of a later start applies the plan that it finds."""
    startup_plan.maybe_apply_startup_plan(worker)
    return worker.cache_config.kv_cache_memory_bytes is not None


def test_the_ranks_of_a_data_parallel_server_share_one_plan_file(plans: Path) -> None:
    first_start(worker_of(0, 130.0), worker_of(1, 139.0))
    assert len(list(plans.glob("*.json"))) == 1


def test_the_last_writers_free_memory_decides_for_all_ranks(plans: Path) -> None:
    """Rank 0 had 130 GiB at the first start and has them again. It does not apply the plan, and rank 1 does."""
    first_start(worker_of(0, 130.0), worker_of(1, 139.0))
    assert [applies(worker_of(0, 130.0)), applies(worker_of(1, 139.0))] == [False, True]


def test_the_order_of_writing_decides_whether_the_ranks_agree(plans: Path) -> None:
    first_start(worker_of(1, 139.0), worker_of(0, 130.0))
    assert [applies(worker_of(0, 130.0)), applies(worker_of(1, 139.0))] == [True, True]


def test_a_rank_that_applies_a_plan_leaves_out_executions_of_the_model(
    plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``determine_available_memory`` of the GPU worker, until it has executed the model or left it out.

    ``profile_cudagraph_memory`` executes the model on dummy batches, with the collectives of all dp ranks.
    """
    first_start(worker_of(0, 130.0), worker_of(1, 139.0))
    monkeypatch.setattr(gpu_worker, "memory_profiling", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda *_: contextlib.nullcontext())
    platform = types.SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False)
    monkeypatch.setattr(gpu_worker, "current_platform", platform)
    executed = {rank: executions_of(worker_of(rank, free)) for rank, free in ((0, 130.0), (1, 139.0))}
    assert executed == {0: ["profile_run", "profile_cudagraph_memory"], 1: ["profile_run"]}


class Profiled(Exception):
    """The worker has executed all that depends on its plan."""


def executions_of(worker: types.SimpleNamespace) -> list[str]:
    executed: list[str] = []

    def profile_cudagraph_memory() -> int:
        executed.append("profile_cudagraph_memory")
        raise Profiled

    worker.model_runner = types.SimpleNamespace(
        profile_run=lambda **_: executed.append("profile_run"),
        profile_cudagraph_memory=profile_cudagraph_memory, model_memory_usage=0,
    )  # fmt: skip
    worker.randomize_dummy_inputs = False
    worker.model_config = types.SimpleNamespace(multimodal_config=None)
    worker.parallel_config._api_process_count = 1
    worker._scoped_allocator_max_split = lambda **_: contextlib.nullcontext()
    with contextlib.suppress(Profiled):
        gpu_worker.Worker.determine_available_memory(worker)
    return executed


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="the key of a plan lacks data_parallel_rank (vLLM 0.32)")
def test_each_rank_has_a_plan_of_its_own(plans: Path) -> None:
    assert fingerprint_of(worker_of(0, 130.0)) != fingerprint_of(worker_of(1, 139.0))


@pytest.mark.xfail(
    strict=True, raises=AssertionError, reason="no vote of the dp ranks on whether all apply their plans (vLLM 0.32)"
)
def test_the_ranks_agree_on_whether_they_apply_their_plans(plans: Path) -> None:
    first_start(worker_of(0, 130.0), worker_of(1, 139.0))
    assert applies(worker_of(0, 130.0)) == applies(worker_of(1, 139.0))
