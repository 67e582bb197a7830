"""The table of the recorder's hooks: which attribute of vLLM is replaced, and by what.

If a version of vLLM lacks such an attribute, the server runs without this hook, and a printed line says what is not
recorded therefore.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from repro.attach.notice import notice
from repro.attach.record import rank, start
from repro.attach.record.imports import after_import
from repro.attach.vllm import exchange, places, worker
from repro.attach.vllm.processes import engine, front

JOB = "vllm"
"""The name of the job. All processes of a server use the same name, so they record into one folder."""


class Hook(NamedTuple):
    """One replaced attribute of vLLM.

    module    the module that defines the attribute
    names     names of the attribute in different versions, "Class.method" or "function"; the first that exists is
              replaced
    make      takes the attribute's value, and returns what replaces it
    shows     what the record lacks without this hook
    versions  versions of vLLM that are known to have the attribute; other versions possibly lack it
    """

    module: str
    names: tuple[str, ...]
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    shows: str
    versions: str = "0.20 to 0.33"


_GPU, _CPU = "vllm.v1.worker.gpu_worker", "vllm.v1.worker.cpu_worker"
_GROUPS, _CORE = "vllm.distributed.parallel_state", "vllm.v1.engine.core"
_COMMUNICATOR = "vllm.distributed.device_communicators.base_device_communicator"
_CLIENT = "vllm.v1.engine.core_client"
_QUEUE = "vllm.distributed.device_communicators.shm_broadcast"
_MULTIPROC = "vllm.v1.executor.multiproc_executor"
_GDN = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_OLD_GDN = "vllm.model_executor.layers.mamba.gdn_linear_attn"

HOOKS = (
    Hook(_GPU, ("Worker.init_device",), worker.initialising, "steps and phases"),
    Hook(_CPU, ("CPUWorker.init_device",), worker.initialising, "steps and phases"),
    Hook(_GPU, ("Worker.load_model",), worker.in_phase("load"), "the phase load"),
    Hook(_GPU, ("Worker.determine_available_memory",), worker.in_phase("profile"), "the phase profile"),
    Hook(_CPU, ("CPUWorker.determine_available_memory",), worker.in_phase("profile"), "the phase profile"),
    Hook(_GPU, ("Worker.initialize_from_config",), worker.in_phase("allocate"), "the phase allocate"),
    Hook(_GPU, ("Worker.compile_or_warm_up_model",), worker.in_phase("compile"), "the phase compile"),
    Hook(_CPU, ("CPUWorker.compile_or_warm_up_model",), worker.in_phase("compile"), "the phase compile"),
    Hook("vllm.v1.worker.gpu_model_runner", ("GPUModelRunner.capture_model",), worker.in_phase("capture"), "capture"),
    Hook(_GPU, ("Worker.execute_model",), worker.executing, "live requests of a step"),
    Hook(_GPU, ("Worker.execute_dummy_batch",), worker.executing_dummy, "dummy batches"),
    Hook("vllm.v1.worker.dp_utils", ("_run_ar",), worker.agreeing, "where a step begins"),
    Hook(_COMMUNICATOR, ("DeviceCommunicatorBase.__init__",), worker.naming, "names of groups"),
    Hook(_GROUPS, ("GroupCoordinator.__init__",), worker.naming, "names of groups"),
    Hook(_GROUPS, ("GroupCoordinator.all_gatherv",), exchange.exchanging("all_gather_v", 1), "dispatch"),
    Hook(_GROUPS, ("GroupCoordinator.reduce_scatterv",), exchange.exchanging("reduce_scatter_v", 1), "combine"),
    Hook(
        _GROUPS, ("GroupCoordinator.reduce_scatterv_into_output",), exchange.exchanging("reduce_scatter_v", 2),
        "combine into an output", "0.32 on",
    ),
    Hook(
        "vllm.model_executor.layers.fused_moe.runner.moe_runner", ("MoERunner._forward_impl",),
        worker.in_layer("layer_name"), "the MoE layer of a collective",
    ),
    Hook(_GDN, ("QwenGatedDeltaNetAttention.forward_cpu",), worker.in_layer("prefix"), "the GDN layer", "0.24 on"),
    Hook(_GDN, ("QwenGatedDeltaNetAttention.forward_cuda",), worker.in_layer("prefix"), "the GDN layer", "0.24 on"),
    Hook(_OLD_GDN, ("GatedDeltaNetAttention.forward_cuda",), worker.in_layer("prefix"), "the GDN layer", "0.20"),
    Hook(_MULTIPROC, ("WorkerProc.shutdown",), worker.ending, "the end of workers that are killed during shutdown"),
    Hook(_QUEUE, ("MessageQueue.dequeue",), worker.receiving, "idle workers"),
    Hook(_CORE, ("DPEngineCoreProc._init_data_parallel",), engine.constructing, "the engines"),
    Hook(_CORE, ("DPEngineCoreProc._has_global_unfinished_reqs",), engine.counting, "executions left out"),
    Hook(_CORE, ("EngineCoreProc._process_input_queue",), engine.waiting_for_requests, "engines without requests"),
    Hook(_MULTIPROC, ("MultiprocExecutor.execute_model",), engine.requesting, "executions left out"),
    Hook(_MULTIPROC, ("MultiprocExecutor.execute_dummy_batch",), engine.requesting_dummy, "executions left out"),
    Hook(_CLIENT, ("MPClient.__init__",), front.starting, "the front end"),
    Hook(_CLIENT, ("SyncMPClient.get_output",), front.receiving, "front ends that wait for outputs"),
    Hook(
        "vllm.config.parallel", ("ParallelConfig.sync_dp_state", "ParallelConfig.has_unfinished_dp"), engine.asking,
        'the question "is anyone unfinished?"',
    ),
)  # fmt: skip


@functools.cache
def install(directory: str) -> None:
    """Install the hooks in this process; its forked children inherit them. directory: the folder of the recording."""
    if not rank.is_configured():
        start.begin(directory)
    rank.meet_at(JOB)
    rank.declares_steps()
    os.register_at_fork(after_in_child=worker.after_fork)
    os.register_at_fork(after_in_child=engine.after_fork)
    os.register_at_fork(after_in_child=front.after_fork)
    modules: dict[str, list[Hook]] = {}
    for hook in HOOKS:
        modules.setdefault(hook.module, []).append(hook)
    after_import({module: functools.partial(_apply, hooks) for module, hooks in modules.items()})


def _apply(hooks: list[Hook], module: ModuleType) -> None:
    for hook in hooks:
        place = places.find(module, hook.names)
        if place is None:
            notice(
                f"repro record: this vLLM has no {hook.names[0]} in {module.__name__}, so {hook.shows} will not be "
                f"recorded (supported: vLLM {hook.versions})"
            )
        else:
            place.replace(hook.make)
