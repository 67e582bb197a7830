"""Find out whether torch.compile traces a hook of the recorder or the guard. A hook that is traced must do nothing."""

from __future__ import annotations

from collections.abc import Callable


def tracing_test() -> Callable[[], bool]:
    """Return the function of torch that says whether Dynamo (torch.compile) traces the code that calls it.

    While Dynamo traces, it replaces the call of torch's function by a constant. Hooks call torch's function directly,
    about 20 times in a step. When they called it through a function of ours, this function was in 1.8 % of the samples
    of a profile.
    """
    import torch

    return torch.compiler.is_dynamo_compiling
