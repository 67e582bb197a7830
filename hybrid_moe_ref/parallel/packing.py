"""Pack the rows of several tensors into one row of bytes each, so that one collective sends them all.

gloo cannot send float8, but gloo can send bytes. Shape suffixes: N rows, B bytes of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """Pack tensors [N, ...] of any dtype into uint8[N, B]: row n has the bytes of row n of every tensor, B in all."""
    parts = [_as_bytes(x) for x in tensors]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def unpack(packed_NB: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `pack`: return one tensor [N, ...] for each tensor of `like`, with its dtype and row shape.

    packed_NB: N rows of B bytes, as `pack` returns them
    """
    unpacked, column = [], 0
    for x in like:
        width = x.shape[1:].numel() * x.element_size()
        rows_NB = _plain(packed_NB[:, column : column + width])
        unpacked.append(rows_NB.view(x.dtype).view(packed_NB.shape[0], *x.shape[1:]))
        column += width
    return unpacked


def _as_bytes(x: Tensor) -> Tensor:
    """View [N, ...] of any dtype as [N, bytes of a row]; copies only if the rows are not contiguous in memory."""
    return _plain(x.reshape(x.shape[0], x.shape[1:].numel())).view(torch.uint8)


def _plain(x_NB: Tensor) -> Tensor:
    """Return the same rows with row-major strides, so that torch can view the rows in a different dtype.

    `contiguous()` is not enough: torch calls a single row contiguous whatever its strides are.
    """
    plain = x_NB.stride() == (x_NB.shape[1], 1)
    return x_NB if plain else x_NB.clone(memory_format=torch.contiguous_format)
