"""The accumulation dtype of states and sums: float32, or float64 for float64 inputs."""

import torch
from torch import Tensor

_WIDE = (torch.float32, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which states are kept and sums are accumulated for arguments of `dtype`."""
    return dtype if dtype in _WIDE else torch.float32


def widen(x: Tensor) -> Tensor:
    """Convert x to the accumulation dtype.

    Returns x itself if x has that dtype: a `.to()` that does nothing costs as much as a small matmul.
    """
    return x if x.dtype in _WIDE else x.float()


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert x back to `dtype`, the inverse of `widen`."""
    return x if x.dtype == dtype else x.to(dtype)
