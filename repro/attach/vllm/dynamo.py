"""Find out whether torch.compile traces a hook of the recorder or the guard. A hook that is traced must do nothing."""

from __future__ import annotations

from collections.abc import Callable


def tracing_test() -> Callable[[], bool]:
    """Return the function of torch that says whether Dynamo (torch.compile) traces the code that calls it.

    While Dynamo traces, it replaces the call of torch's function by a constant. Hooks call torch's function about 20
    times in a step. They call it directly, because a function of ours around it was seen in 1.8 % of the samples of a
    profile: at some depths of the call stack, CPython maps new memory for each further call of a Python function.
    """
    import torch

    return torch.compiler.is_dynamo_compiling
