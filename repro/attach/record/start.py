"""Start recording in this process: install hooks that run when the program imports a module."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from repro.attach.record import builds, children, ddp, functional, groups, locks, modules, rank
from repro.attach.record.imports import Hook, after_import

HOOKS: dict[str, Hook] = {
    "fcntl": locks.hook_fcntl,
    "filelock": locks.hook_filelock,
    "torch.utils.file_baton": locks.hook_file_baton,
    "torch.utils.cpp_extension": builds.hook_extension,
    "torch._inductor.compile_fx": builds.hook_inductor,
    "flashinfer.jit.core": builds.hook_flashinfer,
    "triton.runtime.jit": builds.hook_triton,
    "torch.distributed.distributed_c10d": groups.hook,
    "torch.distributed._functional_collectives": functional.hook,
    "torch.nn.parallel.distributed": ddp.hook,
    "torch.autograd.graph": ddp.hook_backward,
    "torch.nn.modules.module": modules.hook,
    "torch.distributed.fsdp._fully_shard._fsdp_param_group": modules.hook_fsdp,
    "torch.distributed.pipelining.stage": modules.hook_pipeline,
    "torch.distributed.pipelining.schedules": modules.hook_schedule,
    "multiprocessing.process": children.hook_process,
    "torch.multiprocessing.spawn": children.hook_spawn,
}
"""Module -> the function that is called once the program has imported the module."""


def begin(directory: str) -> None:
    """Record this process in the folder ``directory`` from the moment when the process becomes a rank.

    Call this before the program's first import.
    """
    rank.configure(Path(directory), modules=bool(os.environ.get("HMR_RECORD_MODULES")))
    install()


@functools.cache
def install() -> None:
    """Install the hooks of the table HOOKS: now for modules that are imported already, else after their import.

    The hooks do nothing until this process is a rank.
    """
    after_import(HOOKS)
