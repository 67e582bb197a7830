"""Whether torch.compile traces a hook of the recorder or the guard. Such a hook must do nothing."""

from __future__ import annotations

from collections.abc import Callable


def tracing_test() -> Callable[[], bool]:
    """Return torch's function that is true where Dynamo traces the caller: Dynamo replaces its call by a constant.

    Hooks call it directly, about 20 times in a step. A function of ours around it would cost 1 % of a step of a small
    model, because each call of a Python function at a certain depth maps new memory (CPython's stack of frames).
    """
    import torch

    return torch.compiler.is_dynamo_compiling
