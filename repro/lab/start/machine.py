"""Check before any rank starts that this machine has what a run needs."""

from __future__ import annotations

import importlib.util

from repro.hosts.gpus import count_gpus


class CannotRunHere(RuntimeError):
    """This machine lacks what the run needs. The text says what is missing."""


def require_model() -> None:
    """Raise CannotRunHere if torch or safetensors, which only the reference model needs, is not installed."""
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRunHere(
            f"a run needs {' and '.join(missing)}, which is not installed: pip install torch numpy safetensors"
        )


def require_gpus(num_ranks: int) -> None:
    """Raise CannotRunHere if this machine has fewer than ``num_ranks`` GPUs."""
    if (count := count_gpus()) < num_ranks:
        raise CannotRunHere(f"--backend nccl needs a GPU for each of {num_ranks} ranks; {count} found")
