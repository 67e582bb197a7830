"""Describe the part of a full parameter that a rank holds.

`HybridMoE.slices` has one `Slice` for every parameter that is held in part, by its name in the unsharded model;
a parameter without one is held whole. Code that fills parameters, from a seed or from a checkpoint, reads the full
shape and the ranges there, and needs to know nothing of ranks. Importing this module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Range = tuple[int, int]
"""First index, and the one after the last."""

Cuts = tuple[tuple[int, tuple[Range, ...]], ...]
"""(dimension, its ranges that are held, in the order in which they lie in the part); other dimensions are whole."""


@dataclass(frozen=True)
class Slice:
    """The part of a tensor of `full_shape` that remains after `cuts`."""

    full_shape: tuple[int, ...]
    cuts: Cuts = ()

    def __post_init__(self) -> None:
        for dim, ranges in self.cuts:
            for start, stop in ranges:
                assert 0 <= start <= stop <= self.full_shape[dim], (self.full_shape, self.cuts)

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's shape."""
        sizes = list(self.full_shape)
        for dim, ranges in self.cuts:
            sizes[dim] = sum(stop - start for start, stop in ranges)
        return tuple(sizes)

    @property
    def row(self) -> Slice:
        """The slice of each row, for code that handles the rows of the first dimension one by one."""
        return Slice(self.full_shape[1:], tuple((dim - 1, ranges) for dim, ranges in self.cuts if dim))

    def of(self, full: Tensor) -> Tensor:
        """The part of `full`: a view where each dimension keeps one range, else a copy."""
        if tuple(full.shape) != self.full_shape:
            raise ValueError(f"a tensor of shape {list(full.shape)}, wanted {list(self.full_shape)}")
        import torch

        part = full
        for dim, ranges in self.cuts:
            parts = [part.narrow(dim, start, stop - start) for start, stop in ranges]
            part = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return part


def scaled(held: Range, by: int) -> Range:
    """The range of elements when each index of `held` stands for `by` of them."""
    return held[0] * by, held[1] * by


def sections(parts: Iterable[tuple[int, Range]]) -> tuple[Range, ...]:
    """The ranges of a dimension that is several sections of the given sizes, one after another, when a range of each
    is held."""
    ranges, offset = [], 0
    for size, (start, stop) in parts:
        ranges.append((offset + start, offset + stop))
        offset += size
    return tuple(ranges)
