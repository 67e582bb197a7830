"""Record the exception that ends a child process of multiprocessing. Python does not call sys.excepthook there."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

from repro.attach.record import rank
from repro.attach.record.imports import replace


def hook_process(module: ModuleType) -> None:
    """Hook the method that runs a child process of multiprocessing, to record an exception in the child."""
    replace(module.BaseProcess, "run", _reporting)


def hook_spawn(module: ModuleType) -> None:
    """Hook the function that torch.multiprocessing runs in each child process, to record an exception in the child.

    torch's function catches the exceptions of the program's own function, and ignores KeyboardInterrupt. So without the
    hook, a rank that the user interrupted would end as if it had finished its work.
    """

    def wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def _wrap(function: Callable[..., Any], *args: Any) -> Any:
            return original(_reporting(function), *args)

        return _wrap

    replace(module, "_wrap", wrapping)


def _reporting(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def reported(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except BaseException as error:
            rank.failed(error)
            raise

    return reported
