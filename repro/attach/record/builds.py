"""Record what a rank builds: extensions of torch, modules of FlashInfer, kernels of Triton, graphs of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from repro.attach.record import rank as this
from repro.attach.record.imports import replace


def hook_extension(module: ModuleType) -> None:
    replace(module, "_jit_compile", lambda original: _build(original, lambda name, *_, **__: f"extension {name}"))


def hook_inductor(module: ModuleType) -> None:
    replace(module, "compile_fx", lambda original: _build(original, lambda *_, **__: "torch.compile"))


def hook_flashinfer(module: ModuleType) -> None:
    """Hook `run_ninja`, the function of FlashInfer that builds a module.

    The caller of `run_ninja` is not hooked: it first waits for the module's lock, and a rank that only waits for this
    lock would be recorded as a rank that builds. (FlashInfer 0.6 and 0.7.)
    """

    def name(build_dir: Any, ninja_path: Any, *_: Any, **__: Any) -> str:
        return f"FlashInfer module {getattr(getattr(ninja_path, 'parent', None), 'name', ninja_path)}"

    replace(module, "run_ninja", lambda original: _build(original, name))


def hook_triton(module: ModuleType) -> None:
    def name(kernel: Any, *_: Any, **__: Any) -> str:
        return f"Triton kernel {getattr(kernel, '__name__', '')}"

    replace(module.JITFunction, "_do_compile", lambda original: _build(original, name))


def _build(original: Any, name: Callable[..., str]) -> Any:
    @wraps(original)
    def build(*args: Any, **options: Any) -> Any:
        rank = this.current
        if rank is None:
            return original(*args, **options)
        label = name(*args, **options)
        rank.local_event("build_begin", label)
        try:
            return original(*args, **options)
        finally:
            rank.local_event("build_end", label)

    return build
