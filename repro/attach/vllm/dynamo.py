"""Whether torch.compile traces a hook of the recorder or the guard. Such a hook must do nothing."""

from __future__ import annotations

import sys


def is_tracing() -> bool:
    """Whether Dynamo traces the caller. In a traced hook, Dynamo replaces a call of this function by a constant."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()
