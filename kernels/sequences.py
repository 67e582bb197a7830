"""Handle sequences of different lengths in one batch, for implementations in plain torch.

Shapes: T rows of all sequences, one after another, B sequences, X = B + 1 bounds (sequence b is between bounds
b and b + 1), J slots of a pool (each holds the state of one sequence), Z chunks of all sequences, C rows of a chunk.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def by_length(cu_seqlens_X: Tensor) -> Iterator[tuple[list[int] | slice, Tensor | slice, int]]:
    """Yield, for each length except 0: the sequences of this length, their rows in order, and the length.

    If all sequences have the same length, sequences and rows are slices.
    """
    starts = cu_seqlens_X.tolist()
    members: dict[int, list[int]] = {}
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        if end > start:
            members.setdefault(end - start, []).append(index)
    if len(members) == 1 and len(next(iter(members.values()))) == len(starts) - 1:
        yield slice(None), slice(None), next(iter(members))
        return
    for length, indices in members.items():
        first_rows = torch.tensor([starts[index] for index in indices], device=cu_seqlens_X.device)
        steps = torch.arange(length, device=cu_seqlens_X.device)
        yield indices, (first_rows[:, None] + steps).flatten(), length


@dataclass(frozen=True)
class Chunks:
    """Sequences of any lengths, cut into chunks of `size` rows; the last chunk of each sequence is padded with zeros.

    Chunks are in the order in which a recurrence needs them: the first chunks of all sequences, then the second ones.
    Sequences are sorted by length, longest first, so those that have an n-th chunk are the first `counts[n]` ones.

    order    indices of the sequences in that order, without sequences that have no rows
    counts   number of sequences that have an n-th chunk, for each n
    rows_Z_  index of the row at each position of each chunk, [Z C], and num_rows at positions that are padding; None if
             the rows are in order already
    """

    size: int
    order: list[int]
    counts: list[int]
    num_rows: int
    rows_Z_: Tensor | None

    @classmethod
    def of(cls, cu_seqlens_X: Tensor, size: int) -> "Chunks":
        """Cut sequences into chunks of `size` rows. If all are shorter, a chunk is as long as the longest of them."""
        starts = cu_seqlens_X.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
        longest = lengths[order[0]] if order else 0
        size = min(size, max(1, longest))
        begins: list[int] = []
        ends: list[int] = []
        counts: list[int] = []
        for first in range(0, longest, size):
            having = [index for index in order if lengths[index] > first]
            counts.append(len(having))
            begins += [starts[index] + first for index in having]
            ends += [starts[index + 1] for index in having]
        rows_Z_ = None
        if len(order) > 1:
            device = cu_seqlens_X.device
            rows_ZC = torch.tensor(begins, device=device)[:, None] + torch.arange(size, device=device)
            is_padding_ZC = rows_ZC >= torch.tensor(ends, device=device)[:, None]
            rows_Z_ = rows_ZC.masked_fill(is_padding_ZC, starts[-1]).flatten()
        return cls(size, order, counts, starts[-1], rows_Z_)

    def cut(self, x_T_: Tensor) -> Tensor:
        """Cut rows [T, ...] into chunks [Z, C, ...]."""
        if self.rows_Z_ is None:
            padding = -x_T_.shape[0] % self.size
            return F.pad(x_T_, (*(0, 0) * (x_T_.dim() - 1), 0, padding)).unflatten(0, (-1, self.size))
        zeros = x_T_.new_zeros(1, *x_T_.shape[1:])
        return torch.cat([x_T_, zeros]).index_select(0, self.rows_Z_).unflatten(0, (-1, self.size))

    def join(self, x_ZC_: Tensor) -> Tensor:
        """Join chunks [Z, C, ...] to rows [T, ...], without the padding."""
        x_Z_ = x_ZC_.flatten(0, 1)
        if self.rows_Z_ is None:
            return x_Z_[: self.num_rows]
        return x_Z_.index_select(0, self.rows_Z_.argsort()[: self.num_rows])


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether autograd records computations on these tensors. If so, their storage must not change in place."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def load(pool_J_: Tensor, slots_B: Tensor, *, copy: bool = False) -> Tensor:
    """Return the states in these slots: a view for a single slot on the CPU, unless `copy` is set; else a copy."""
    if slots_B.numel() == 1 and not slots_B.is_cuda and not copy:
        return pool_J_.narrow(0, int(slots_B), 1)
    return pool_J_[slots_B]


def store(pool_J_: Tensor, slots_B: Tensor, states_B_: Tensor) -> None:
    """Write the states back into the pool, detached, so that no gradient flows through a pool."""
    states_B_ = states_B_.detach()
    if states_B_.untyped_storage().data_ptr() == pool_J_.untyped_storage().data_ptr():
        return  # `load` returned a view, so the pool already has the new values
    if slots_B.numel() == 1 and not slots_B.is_cuda:
        pool_J_.narrow(0, int(slots_B), 1).copy_(states_B_)
    else:
        pool_J_[slots_B] = states_B_.to(pool_J_.dtype)


def sums_between(a__C: Tensor) -> Tensor:
    """Return [..., t, s], the sum of a over s < u <= t, zero where s >= t.

    Each sum is computed from its own terms, because the difference of two prefix sums would lose the last bits.
    """
    return a__C[..., None].expand(*a__C.shape, a__C.shape[-1]).tril(-1).cumsum(-2)
