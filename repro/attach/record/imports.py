"""Call a function right after the program has imported a module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from repro.attach.notice import notice

Hook = Callable[[ModuleType], None]


def after_import(hooks: Mapping[str, Hook]) -> None:
    """Call ``hooks[name](module)`` right after the program has imported the module ``name``.

    If the module is imported already, call the hook at once.
    """
    waiting = {}
    for name, hook in hooks.items():
        module = sys.modules.get(name)
        if module is None:
            waiting[name] = hook
        else:
            _apply(hook, module)
    sys.meta_path.insert(0, _Finder(waiting))


class _Finder:
    """Finds a module through the other finders, and wraps the module's loader, to call a function after the import."""

    def __init__(self, hooks: dict[str, Hook]) -> None:
        self._hooks = hooks

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        hook = self._hooks.pop(name, None)  # remove the hook first, because the search below calls this finder again
        if hook is None:
            return None
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, hook)  # type: ignore[assignment]
        return spec


class _Loader:
    """A loader that calls the function ``hook`` after the module's own loader has executed the module."""

    def __init__(self, loader: Any, hook: Hook) -> None:
        self._loader, self._hook = loader, hook

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _apply(self._hook, module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _apply(hook: Hook, module: ModuleType) -> None:
    """Call ``hook(module)``. If it raises an exception, print that the module is not recorded.

    For example, a hook raises an exception if it does not know this version of the module.
    """
    try:
        hook(module)
    except Exception as error:
        notice(f"repro record: {module.__name__} is not recorded: {type(error).__name__}: {error}")


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace ``owner.name`` by ``make(original)``, where ``original`` is the attribute's value.

    Do nothing if the attribute does not exist.

    torch.compile starts no graph inside a function of torch. If the replacement is a Python function, it is marked so
    that torch.compile starts no graph inside it either.
    """
    original = getattr(owner, name, None)
    if original is None:
        return
    made = make(original)
    if "torch._C" in sys.modules and isinstance(made, FunctionType):
        _keep_graphs_from_starting_at(made)
    setattr(owner, name, made)


def _keep_graphs_from_starting_at(function: FunctionType) -> None:
    """Tell torch.compile to start no graph in this function.

    torch._dynamo.eval_frame.skip_code does the same, but the import of torch._dynamo takes a second.
    """
    native: Any = sys.modules["torch._C"]
    frames = native._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # an internal interface of torch, which another version may not have
        skipped = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
        frames.set_code_exec_strategy(function.__code__, skipped)
