"""Prepare before you communicate: build what the first step would build, on one rank of each host at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def loading(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Worker.load_model, after which the model exists and has not run."""

    @wraps(original)
    def load_model(self: Any, *args: Any, **options: Any) -> Any:
        return original(self, *args, **options)

    return load_model
