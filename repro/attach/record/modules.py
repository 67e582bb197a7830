"""Find the name of the torch.nn.Module that a collective belongs to.

The names of FSDP groups and pipeline stages are always recorded, other modules only if HMR_RECORD_MODULES is set.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

from repro.attach.record import rank as this
from repro.attach.record.imports import replace

_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def hook(module: ModuleType) -> None:
    """If HMR_RECORD_MODULES is set, hook torch.nn.Module, so that the recorder knows which module each thread runs.

    For a model that torch.compile has compiled, only the name of the whole model is known, because the modules in it
    run as one graph.

    module: torch.nn.modules.module
    """
    if not this.with_modules:
        return
    import torch

    def naming(original: Any) -> Any:
        def _call_impl(self: Any, *args: Any, **options: Any) -> Any:
            rank = this.current
            if rank is None or torch.compiler.is_compiling():
                return original(self, *args, **options)
            with rank.in_layer(_name(self)):
                return original(self, *args, **options)

        return _call_impl

    replace(module.Module, "_call_impl", naming)


def _name(module: Any) -> str:
    """Return the name of a module within the model, such as "layers.0.mlp". The model's own name is its class.

    The model is the module that ran first among those that contain this module.
    """
    name = _names.get(module)
    if name is None:
        for inner_name, inner in module.named_modules():
            _names.setdefault(inner, inner_name or type(module).__name__)
        name = _names[module]
    return name


def hook_fsdp(module: ModuleType) -> None:
    def name(group: Any) -> str:
        return str(getattr(group, "_module_fqn", None) or "")

    for method in ("unshard", "wait_for_unshard", "post_backward", "pre_backward"):
        replace(module.FSDPParamGroup, method, lambda original: _in_layer(original, name))


def hook_pipeline(module: ModuleType) -> None:
    def name(stage: Any) -> str:
        return f"pipeline stage {getattr(stage, 'stage_index', '?')}"

    for method in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
        replace(module._PipelineStageBase, method, lambda original: _in_layer(original, name))


def hook_schedule(module: ModuleType) -> None:
    """Hook torch's pipeline schedules, which send and receive tensors between the passes of the stages.

    Such a transfer belongs to no single stage, so its record names all stages of the rank.
    """

    def name(schedule: Any) -> str:
        stages = [schedule._stage] if hasattr(schedule, "_stage") else schedule._stages
        indices = [str(stage.stage_index) for stage in stages]
        return f"pipeline stage{'s' if len(indices) > 1 else ''} {','.join(indices)}"

    for owner in (module.PipelineScheduleSingle, module.PipelineScheduleMulti):
        for method in ("step", "eval"):
            if method in vars(owner):
                replace(owner, method, lambda original: _in_layer(original, name))


def _in_layer(original: Any, name: Callable[[Any], str]) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        rank = this.current
        if rank is None:
            return original(self, *args, **options)
        with rank.in_layer(name(self) or rank.local.layer):
            return original(self, *args, **options)

    return call
