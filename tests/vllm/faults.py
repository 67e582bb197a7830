"""Six faults for the real vLLM: a plug-in of ``vllm.general_plugins`` for tests. HMR_FAULT names one.

    skipped_dummy     the engine of rank 0 leaves out one dummy batch
    extra_collective  rank 1 issues one more step agreement inside its first GDN layer
    straggler         rank 1 sleeps 20 s
    lock              rank 0 holds a lock in the step agreement, and rank 1 waits for the lock
    killed_worker     rank 1's worker is killed after its step agreement
    building          rank 1 compiles a C++ extension where it warms up, and the others wait for it

A fault comes in execution 9 of the rank, but skipped_dummy in the fifth dummy batch and building at the start.
"""

from __future__ import annotations

import functools
import os
import signal
import time
from typing import Any

EXECUTION = 9
DUMMY = 5
_count = {"executions": 0, "dummies": 0}
_arguments: list[tuple[Any, Any]] = []  # of the last step agreement


def register() -> None:
    fault = os.environ.get("HMR_FAULT")
    if fault:
        _install(fault)


@functools.cache
def _install(fault: str) -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker import cpu_worker, dp_utils, gpu_worker

    if fault == "skipped_dummy":
        EngineCore.execute_dummy_batch = _skipping(EngineCore.execute_dummy_batch)
    elif fault == "building":
        cpu_worker.CPUWorker.compile_or_warm_up_model = _building(cpu_worker.CPUWorker.compile_or_warm_up_model)
    elif fault == "extra_collective":
        from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention

        owner = QwenGatedDeltaNetAttention
        owner._output_projection = _repeating(owner._output_projection, dp_utils)
        dp_utils._run_ar = _keeping(dp_utils._run_ar)
    elif fault == "lock":
        dp_utils._run_ar = _locking(dp_utils._run_ar)
    elif fault == "straggler":
        gpu_worker.Worker.execute_model = _sleeping(gpu_worker.Worker.execute_model)
    elif fault == "killed_worker":
        dp_utils._run_ar = _killing(dp_utils._run_ar)
    else:
        raise ValueError(f"HMR_FAULT={fault} is no fault of this file")


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank()


def _skipping(original: Any) -> Any:
    def execute_dummy_batch(self: Any) -> Any:
        _count["dummies"] += 1
        if self.dp_rank == 0 and _count["dummies"] == DUMMY:
            print("HMR_FAULT: skipped a dummy batch", flush=True)
            return None
        return original(self)

    return execute_dummy_batch


def _building(original: Any) -> Any:
    def compile_or_warm_up_model(self: Any) -> Any:
        import torch.distributed as dist
        from vllm.distributed.parallel_state import get_dp_group

        if _rank() == 1:
            print("HMR_FAULT: builds", flush=True)
            build()
        dist.barrier(group=get_dp_group().cpu_group)  # as the first execution of a GPU's warm-up would
        return original(self)

    return compile_or_warm_up_model


def build() -> None:
    """Build the extension, or load it if it is built. Also a builder for HMR_GUARD_BUILDERS."""
    from torch.utils import cpp_extension

    cpp_extension.load_inline("fused_gdn", "int one() { return 1; }", functions=["one"])


def build_on_rank_0() -> None:
    """A builder that fails on rank 1."""
    if _rank() == 1:
        raise RuntimeError("nvcc fatal: Unsupported gpu architecture 'compute_90a'")
    build()


def _keeping(original: Any) -> Any:
    def _run_ar(*args: Any, **options: Any) -> Any:
        _count["executions"] += 1
        _arguments[:] = [(args, options)]
        return original(*args, **options)

    return _run_ar


def _repeating(original: Any, dp_utils: Any) -> Any:
    def _output_projection(self: Any, *args: Any, **options: Any) -> Any:
        if self.prefix.endswith("layers.0.linear_attn") and _count["executions"] == EXECUTION and _rank() == 1:
            positional, named = _arguments[-1]
            print("HMR_FAULT: one more step agreement", flush=True)
            dp_utils._run_ar(*positional, **named)
        return original(self, *args, **options)

    return _output_projection


def _locking(original: Any) -> Any:
    def _run_ar(*args: Any, **options: Any) -> Any:
        import filelock

        _count["executions"] += 1
        if _count["executions"] != EXECUTION:
            return original(*args, **options)
        lock = filelock.FileLock(os.environ["HMR_FAULT_LOCK"])
        if _rank() == 1:
            time.sleep(2)
        with lock:
            print("HMR_FAULT: holds the lock", flush=True)
            return original(*args, **options)

    return _run_ar


def _sleeping(original: Any) -> Any:
    def execute_model(self: Any, scheduler_output: Any) -> Any:
        _count["executions"] += 1
        if _count["executions"] == EXECUTION and _rank() == 1:
            print("HMR_FAULT: sleeps", flush=True)
            time.sleep(20)
        return original(self, scheduler_output)

    return execute_model


def _killing(original: Any) -> Any:
    def _run_ar(*args: Any, **options: Any) -> Any:
        rows = original(*args, **options)
        _count["executions"] += 1
        if _count["executions"] == EXECUTION and _rank() == 1:
            print("HMR_FAULT: is killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return rows

    return _run_ar
