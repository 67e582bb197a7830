"""Check before any rank starts that this machine has what a run needs."""

from __future__ import annotations

import importlib.util

from repro.hosts.gpus import count_gpus


class CannotRunHere(RuntimeError):
    """This machine lacks what the run needs; the text says what."""


def require_model() -> None:
    """Raise CannotRunHere if the packages are missing that the reference model needs and the judge does not."""
    missing = [name for name in ("torch", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRunHere(
            f"{' and '.join(missing)} not installed, which a run needs: pip install torch numpy safetensors"
        )


def require_gpus(num_ranks: int) -> None:
    """Raise CannotRunHere without a GPU for each rank."""
    if (count := count_gpus()) < num_ranks:
        raise CannotRunHere(f"--backend nccl needs a GPU for each of {num_ranks} ranks; {count} found")
