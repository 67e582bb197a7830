"""Sequences of any lengths in one batch, for implementations in plain torch.

Shapes: T rows of all sequences, one after another, B sequences, X = B + 1, J slots of a pool.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def by_length(cu_seqlens_X: Tensor) -> Iterator[tuple[list[int] | slice, Tensor | slice, int]]:
    """For each length but zero: the sequences that have it, their rows in order, and the length. All sequences equally
    long is one slice."""
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


def load(pool_J_: Tensor, slots_B: Tensor) -> Tensor:
    """The states of the slots: a view for a single one on the CPU, else a copy."""
    if slots_B.numel() == 1 and not slots_B.is_cuda:
        return pool_J_.narrow(0, int(slots_B), 1)
    return pool_J_[slots_B]


def store(pool_J_: Tensor, slots_B: Tensor, states_B_: Tensor) -> None:
    """Put the states back."""
    if states_B_.untyped_storage().data_ptr() == pool_J_.untyped_storage().data_ptr():
        return  # what `load` gave was changed where it is
    if slots_B.numel() == 1 and not slots_B.is_cuda:
        pool_J_.narrow(0, int(slots_B), 1).copy_(states_B_)
    else:
        pool_J_[slots_B] = states_B_.to(pool_J_.dtype)


def sums_between(a__C: Tensor) -> Tensor:
    """[..., t, s]: the sum of a over s < u <= t, zero where s >= t. Added up rather than subtracted: differences of
    long sums lose their last bits."""
    return a__C[..., None].expand(*a__C.shape, a__C.shape[-1]).tril(-1).cumsum(-2)
