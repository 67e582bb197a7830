"""The table of the guard's hooks: which attribute of vLLM or torch is replaced, and by what.

If a version of vLLM lacks such an attribute, a line in the log says so. Without a hook that is marked `essential`, the
ranks cannot compare their steps. Then with HMR_GUARD=agree the start vote refuses the start, and with HMR_GUARD=observe
the guard is off.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from repro.attach.notice import notice
from repro.attach.record.imports import after_import, replace
from repro.attach.record.methods import METHODS
from repro.attach.vllm import places
from repro.attach.vllm.guard import engine, frontend, worker
from repro.attach.vllm.guard.preparation import prepare


class Hook(NamedTuple):
    """One replaced attribute of vLLM.

    module     the module that defines the attribute
    names      names of the attribute in different versions, "Class.method" or "function"; the first that exists is
               replaced
    make       takes the attribute's value, and returns what replaces it
    shows      what the guard does not see without this hook
    versions   versions of vLLM that are known to have the attribute
    essential  whether the ranks cannot compare their steps without this hook
    """

    module: str
    names: tuple[str, ...]
    make: Callable[[Any], Any]
    shows: str
    versions: str = "0.20 to 0.33"
    essential: bool = False


_GPU, _CPU = "vllm.v1.worker.gpu_worker", "vllm.v1.worker.cpu_worker"
_GROUPS, _CORE = "vllm.distributed.parallel_state", "vllm.v1.engine.core"
_MULTIPROC, _UNIPROC = "vllm.v1.executor.multiproc_executor", "vllm.v1.executor.uniproc_executor"
_PYNCCL = "vllm.distributed.device_communicators.pynccl"
_GDN = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_OLD_GDN = "vllm.model_executor.layers.mamba.gdn_linear_attn"
_start = worker.executing_always(False)

HOOKS = (
    Hook("vllm.v1.worker.dp_utils", ("dist",), worker.widening, "the step agreement", essential=True),
    Hook("vllm.v1.worker.gpu.dp_utils", ("dist",), worker.widening, "the step agreement", "0.24 on", essential=True),
    Hook(_GROUPS, ("GroupCoordinator.__init__",), worker.naming, "names of groups"),
    Hook(_GROUPS, ("GroupCoordinator.all_gatherv",), worker.exchanging("all_gather_v"), "dispatch", essential=True),
    Hook(
        _GROUPS, ("GroupCoordinator.reduce_scatterv",), worker.exchanging("reduce_scatter_v"), "combine",
        essential=True,
    ),
    Hook(
        _GROUPS, ("GroupCoordinator.reduce_scatterv_into_output",), worker.exchanging("reduce_scatter_v"),
        "combine into an output", "0.32 on",
    ),
    Hook(_PYNCCL, ("PyNcclCommunicator.all_reduce",), worker.exchanging("all_reduce", "group"), "pynccl"),
    Hook(_PYNCCL, ("PyNcclCommunicator.all_gather",), worker.exchanging("all_gather", "group"), "pynccl"),
    Hook(_PYNCCL, ("PyNcclCommunicator.reduce_scatter",), worker.exchanging("reduce_scatter", "group"), "pynccl"),
    Hook(_PYNCCL, ("PyNcclCommunicator.broadcast",), worker.exchanging("broadcast", "group"), "pynccl"),
    Hook(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner", ("MoERunner._forward_impl",),
        worker.in_layer("layer_name"), "the MoE layer of a collective",
    ),
    Hook(_GDN, ("QwenGatedDeltaNetAttention.forward_cpu",), worker.in_layer("prefix"), "the GDN layer", "0.24 on"),
    Hook(_GDN, ("QwenGatedDeltaNetAttention.forward_cuda",), worker.in_layer("prefix"), "the GDN layer", "0.24 on"),
    Hook(_OLD_GDN, ("GatedDeltaNetAttention.forward_cuda",), worker.in_layer("prefix"), "the GDN layer", "0.20"),
    Hook(_GPU, ("Worker.init_device",), worker.initialising, "the start vote"),
    Hook(_CPU, ("CPUWorker.init_device",), worker.initialising, "the start vote"),
    Hook(_GPU, ("Worker.load_model",), prepare.loading, "what is built before the ranks communicate"),
    Hook(_GPU, ("Worker.determine_available_memory",), _start, "waits at the start"),
    Hook(_CPU, ("CPUWorker.determine_available_memory",), _start, "waits at the start"),
    Hook(_GPU, ("Worker.compile_or_warm_up_model",), _start, "waits at the start"),
    Hook(_CPU, ("CPUWorker.compile_or_warm_up_model",), _start, "waits at the start"),
    Hook(_GPU, ("Worker.execute_model",), worker.executing, "executions"),
    Hook(_GPU, ("Worker.execute_dummy_batch",), worker.executing_always(True), "dummy batches"),
    Hook(_MULTIPROC, ("WorkerProc.shutdown",), worker.ending, "a worker that ends as it should"),
    Hook(_CORE, ("EngineCoreProc.shutdown", "EngineCore.shutdown"), engine.ending, "an engine that ends as it should"),
    Hook(_CORE, ("EngineCoreProc._send_engine_dead",), engine.dying, "an engine that fails"),
    Hook(_CORE, ("DPEngineCoreProc._init_data_parallel",), engine.constructing, "the engines"),
    Hook(_CORE, ("DPEngineCoreProc._has_global_unfinished_reqs",), engine.counting, "executions left out"),
    Hook(_MULTIPROC, ("MultiprocExecutor.execute_model",), engine.requesting, "executions left out"),
    Hook(_MULTIPROC, ("MultiprocExecutor.execute_dummy_batch",), engine.requesting_dummy, "executions left out"),
    Hook(_UNIPROC, ("UniProcExecutor.execute_model",), engine.requesting, "executions left out"),
    Hook(
        "vllm.v1.executor.abstract", ("Executor.execute_dummy_batch",), engine.requesting_dummy, "executions left out",
    ),
    Hook(
        "vllm.v1.engine.utils", ("CoreEngineProcManager.monitor_engine_liveness",), frontend.monitoring,
        "the exit code of the server", "0.28 on",
    ),
    Hook(
        "vllm.config.parallel", ("ParallelConfig.sync_dp_state", "ParallelConfig.has_unfinished_dp"), engine.asking,
        'the question "is anyone unfinished?"',
    ),
)  # fmt: skip


@functools.cache
def install() -> None:
    """Install the hooks in this process; its forked children inherit them."""
    os.register_at_fork(after_in_child=worker.after_fork)
    os.register_at_fork(after_in_child=engine.after_fork)
    modules: dict[str, list[Hook]] = {}
    for hook in HOOKS:
        modules.setdefault(hook.module, []).append(hook)
    hooks: dict[str, Callable[[ModuleType], None]] = {
        module: functools.partial(_apply, found) for module, found in modules.items()
    }
    hooks["torch.distributed.distributed_c10d"] = _hook_torch
    after_import(hooks)


def _hook_torch(module: ModuleType) -> None:
    """Replace the methods of torch's ProcessGroup, for collectives that vLLM's own classes do not issue."""
    import torch._C._distributed_c10d as native

    for name, method in METHODS.items():
        if not method.one_sided:
            replace(native.ProcessGroup, name, worker.calling(method.op))


def _apply(hooks: list[Hook], module: ModuleType) -> None:
    for hook in hooks:
        place = places.find(module, hook.names)
        if place is not None:
            place.replace(hook.make)
            continue
        notice(
            f"repro guard: this vLLM has no {hook.names[0]} in {module.__name__}, so the guard does not see "
            f"{hook.shows} (supported: vLLM {hook.versions})"
        )
        if hook.essential:
            worker.missing.append(f"{module.__name__}.{hook.names[0]}")
