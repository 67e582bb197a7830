"""The tokens of one step, flattened over all sequences, with one row per token.

Sequences with the same number of new tokens form a group: a dense [B, T] block of rows. All decoding sequences are one
group with T = 1. A part of the batch consists of the groups that a mixer (attention, GDN or Mamba-2) processes in one
call. In a part, either every sequence has one new token, or every sequence has more than one.

Shapes:

    N   rows of the batch
    B   sequences of a group
    T   new tokens of each sequence of a group; in an attribute of `Part`: rows of the part
    X   1 + the number of sequences of a part: the first row of each sequence, then the number of rows
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor


class Cached(Protocol):
    """What a batch reads of a cached sequence: `length` (its number of tokens so far), and the device of its cache."""

    length: int

    @property
    def device(self) -> torch.device: ...


S = TypeVar("S", bound=Cached)


@dataclass(frozen=True, eq=False)
class Group(Generic[S]):
    """The sequences of a batch that have the same number of new tokens, `length`.

    rows_BT       index of each new token's row in the batch, [sequences, `length`]
    positions_BT  position of each new token in its sequence, [sequences, `length`]
    starts        number of earlier tokens of each sequence
    sequences     the cached sequences; empty if the tokens are not cached
    """

    rows_BT: Tensor
    positions_BT: Tensor
    starts: tuple[int, ...]
    length: int
    sequences: tuple[S, ...] = ()


@dataclass(frozen=True, eq=False)
class Part(Generic[S]):
    """The sequences of a batch that a mixer (attention, GDN or Mamba-2) processes in one call.

    They are in groups of sequences with the same number of new tokens. The part's rows are in the order of the groups.

    In a part, either every sequence has one new token (decode), or every sequence has more than one.

    cached   for each group of the part, its index among the cached groups of the batch; the views of the cache that a
             layer gets have the same indices; empty if the tokens are not cached
    is_step  whether the part is the whole batch and has its rows in the order of the batch
    tables   rotary tables (cos, sin) of this part by (rotary dim, theta, dtype); all layers share them
    """

    groups: tuple[Group[S], ...]
    cached: tuple[int, ...]
    is_step: bool
    tables: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one new token."""
        return self.groups[0].length == 1

    @property
    def num_sequences(self) -> int:
        return sum(len(group.starts) for group in self.groups)

    @cached_property
    def rows_T(self) -> Tensor:
        """Return, for each row of this part, its index among all rows of the batch."""
        return torch.cat([group.rows_BT.flatten() for group in self.groups])

    @cached_property
    def positions_T(self) -> Tensor:
        return torch.cat([group.positions_BT.flatten() for group in self.groups])

    @cached_property
    def cu_seqlens_X(self) -> Tensor:
        """Return the index, within the part, of each sequence's first row, and then the part's number of rows."""
        starts = [0]
        for group in self.groups:
            starts += [starts[-1] + group.length * (number + 1) for number in range(len(group.starts))]
        return torch.tensor(starts, device=self.groups[0].rows_BT.device)


@dataclass(frozen=True, eq=False)
class Batch(Generic[S]):
    """The tokens of a step.

    groups      the sequences, grouped by their number of new tokens
    num_tokens  number of rows
    last_rows   index of each sequence's last row; the sequences are in the order of their rows
    """

    groups: tuple[Group[S], ...]
    num_tokens: int
    last_rows: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[S, int]], device: torch.device | str | None = None) -> Self:
        """Build a batch of cached sequences.

        pairs: (sequence, number of its new tokens); the rows have this order
        device: the device of the batch; None means the device of the first sequence

        Raises ValueError for a sequence that appears twice or has no new token.
        """
        pairs = list(pairs)
        if len({id(sequence) for sequence, _ in pairs}) != len(pairs):
            raise ValueError("a sequence appears twice in one batch")
        if device is None and pairs:
            device = pairs[0][0].device
        for index, (_, count) in enumerate(pairs):
            if count < 1:
                raise ValueError(f"sequence {index} of the batch has {count} new tokens, but needs at least 1")
        return cls._build([(sequence.length, count, sequence) for sequence, count in pairs], device)

    @classmethod
    def dense(cls, num_sequences: int, length: int, device: torch.device | str | None = None) -> Self:
        """Build a batch of `num_sequences` uncached sequences of `length` tokens each, from position 0."""
        return cls._build([(0, length, None)] * num_sequences if length else [], device)

    @classmethod
    def dummy(cls, num_tokens: int, device: torch.device | str | None = None) -> Self:
        """Build the batch that an idle rank runs: one uncached sequence of `num_tokens` tokens from the zero state.

        The batch is empty if `num_tokens` is 0.
        """
        return cls.dense(1, num_tokens, device)

    @classmethod
    def _build(cls, items: list[tuple[int, int, S | None]], device: torch.device | str | None) -> Self:
        first_rows, num_tokens = [], 0
        for _, count, _ in items:
            first_rows.append(num_tokens)
            num_tokens += count
        by_length: dict[int, list[int]] = {}
        for index, (_, count, _) in enumerate(items):
            by_length.setdefault(count, []).append(index)
        groups = []
        for length, members in by_length.items():
            starts = tuple(items[i][0] for i in members)
            steps_T = torch.arange(length, device=device)
            groups.append(
                Group(
                    rows_BT=torch.tensor([first_rows[i] for i in members], device=device)[:, None] + steps_T,
                    positions_BT=torch.tensor(starts, device=device)[:, None] + steps_T,
                    starts=starts,
                    length=length,
                    sequences=tuple(s for i in members if (s := items[i][2]) is not None),
                )
            )
        last_rows = [row + count - 1 for row, (_, count, _) in zip(first_rows, items, strict=True)]
        return cls(tuple(groups), num_tokens, torch.tensor(last_rows, dtype=torch.long, device=device))

    @cached_property
    def parts(self) -> tuple[Part[S], ...]:
        """Combine the groups of the batch into parts, which a mixer processes one after another.

        The sequences of a part are alike in two ways: either all or none of them are cached, and either all have one
        new token or all have more than one.
        """
        members: dict[tuple[bool, bool], list[Group[S]]] = {}
        for group in self.groups:
            members.setdefault((bool(group.sequences), group.length == 1), []).append(group)
        cached = [group for group in self.groups if group.sequences]
        return tuple(
            Part(
                tuple(groups),
                tuple(cached.index(group) for group in groups) if is_cached else (),
                is_step=len(self.groups) == 1,
            )
            for (is_cached, _), groups in members.items()
        )

    @cached_property
    def order_N(self) -> Tensor:
        """Return an index [N] with which `x_NH[order_N]` brings rows into the order of the batch.

        x_NH has the rows of the first part, then those of the second part, and so on.
        """
        return torch.cat([part.rows_T for part in self.parts]).argsort()

    @property
    def sequences(self) -> list[tuple[S, int]]:
        """Return (sequence, number of its new tokens) for each cached sequence of the batch."""
        return [(sequence, group.length) for group in self.groups for sequence in group.sequences]
