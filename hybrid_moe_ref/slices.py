"""Describe the part of a full parameter that a rank holds.

If a model holds only a part of a parameter, `HybridMoE.slices` has a `Slice` for it, under the parameter's name in the
unsharded model. Code that fills parameters, from a seed or from a checkpoint, reads the full shape and the ranges from
this `Slice`. So this code does not depend on ranks. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Range = tuple[int, int]
"""A range of indices: (first index, last index + 1)."""

Cuts = tuple[tuple[int, tuple[Range, ...]], ...]
"""For each dimension that is cut: (dimension, the ranges of indices that the part keeps, in the order of the part)."""


@dataclass(frozen=True)
class Slice:
    """The part of a tensor that a rank holds.

    full_shape  the shape of the whole tensor
    cuts        for each dimension of which the rank holds only a part: (dimension, the index ranges that it holds); a
                range is (first index, last index + 1)
    """

    full_shape: tuple[int, ...]
    cuts: Cuts = ()

    def __post_init__(self) -> None:
        for dim, ranges in self.cuts:
            for start, stop in ranges:
                assert 0 <= start <= stop <= self.full_shape[dim], (self.full_shape, self.cuts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the part that the rank holds."""
        sizes = list(self.full_shape)
        for dim, ranges in self.cuts:
            sizes[dim] = sum(stop - start for start, stop in ranges)
        return tuple(sizes)

    @property
    def row(self) -> Slice:
        """Return the part that the rank holds of one row (element of the first dimension). It is equal for all rows."""
        return Slice(self.full_shape[1:], tuple((dim - 1, ranges) for dim, ranges in self.cuts if dim))

    def of(self, full: Tensor) -> Tensor:
        """Cut this part out of the tensor `full`. The result is a view if every dimension keeps one range, else a copy.

        Raises ValueError if the shape of `full` is not `full_shape`.
        """
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"the tensor has shape {list(full.shape)}, but must have {list(self.full_shape)}")
        import torch

        part = full
        for dim, ranges in self.cuts:
            parts = [part.narrow(dim, start, stop - start) for start, stop in ranges]
            part = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return part


def scaled(held: Range, by: int) -> Range:
    """Convert a range of items, such as heads, to the range of their elements; each item has `by` elements."""
    return held[0] * by, held[1] * by


def sections(parts: Iterable[tuple[int, Range]]) -> tuple[Range, ...]:
    """Return the ranges that a rank holds of a dimension that consists of several sections, such as q, k and v.

    parts: for each section, its size and the range that the rank holds, counted from the start of the section
    """
    ranges, offset = [], 0
    for size, (start, stop) in parts:
        ranges.append((offset + start, offset + stop))
        offset += size
    return tuple(ranges)
