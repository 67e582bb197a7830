"""The precision of states and sums: float32, or float64 for float64 inputs."""

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states for arguments in `dtype`."""
    return dtype if dtype in _WIDE else torch.float32


def widen(x: Tensor) -> Tensor:
    """x in the dtype of sums. An x that has it is returned as it is: a `.to()` that does nothing costs as much as a
    small product."""
    return x if x.dtype in _WIDE else x.float()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, the inverse of `widen`."""
    return x if x.dtype == dtype else x.to(dtype)
