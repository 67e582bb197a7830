"""One step's tokens: those of all sequences, flattened, one row per token.

Sequences that bring equally many tokens form a group: a dense [B, T] block of rows. All decoding sequences are one
group with T = 1. The mixers take several groups at once, as a part of the step: those of one token, or those of more,
whatever their lengths.

Shapes: N rows of the step, B sequences of a group, T tokens each (in a part: the rows of all), X = 1 + the sequences of
a part.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hybrid_moe_ref.cache import Sequence


@dataclass(frozen=True, eq=False)
class Group:
    """Sequences with `length` new tokens each. `starts` are the tokens that each has seen before;
    `sequences` is empty for tokens that no cache remembers."""

    rows_BT: Tensor
    positions_BT: Tensor
    starts: tuple[int, ...]
    length: int
    sequences: tuple["Sequence", ...] = ()


@dataclass(frozen=True, eq=False)
class Part:
    """Groups that the mixers take together, their rows one group after another: all of them decode, or none does.

    cached   where the groups stand among the cached groups of the step; empty for tokens that no cache remembers
    is_step  the part is the whole step, and has its rows in order
    tables   rotary tables by what they depend on beside the positions, see `layers.rope`
    """

    groups: tuple[Group, ...]
    cached: tuple[int, ...]
    is_step: bool
    tables: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence brings one token."""
        return self.groups[0].length == 1

    @property
    def num_sequences(self) -> int:
        return sum(len(group.starts) for group in self.groups)

    @cached_property
    def rows_T(self) -> Tensor:
        """The part's rows among those of the step."""
        return torch.cat([group.rows_BT.flatten() for group in self.groups])

    @cached_property
    def positions_T(self) -> Tensor:
        return torch.cat([group.positions_BT.flatten() for group in self.groups])

    @cached_property
    def cu_seqlens_X(self) -> Tensor:
        """Where each sequence begins among the part's rows, and the number of rows."""
        starts = [0]
        for group in self.groups:
            starts += [starts[-1] + group.length * (number + 1) for number in range(len(group.starts))]
        return torch.tensor(starts, device=self.groups[0].rows_BT.device)


@dataclass(frozen=True, eq=False)
class Batch:
    """The groups of a step. `last_rows` has the row of each sequence's last token, in the order of the
    sequences."""

    groups: tuple[Group, ...]
    num_tokens: int
    last_rows: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple["Sequence", int]], device: torch.device | str | None = None) -> Self:
        """`num_new_tokens` tokens of each cached sequence; their rows follow one another in the given
        order."""
        pairs = list(pairs)
        if len({id(sequence) for sequence, _ in pairs}) != len(pairs):
            raise ValueError("a sequence appears twice in one batch")
        if device is None and pairs:
            device = pairs[0][0].cache.device
        for index, (_, count) in enumerate(pairs):
            if count < 1:
                raise ValueError(f"sequence {index} of the batch brings {count} tokens; at least 1 is needed")
        return cls._build([(sequence.length, count, sequence) for sequence, count in pairs], device)

    @classmethod
    def dense(cls, num_sequences: int, length: int, device: torch.device | str | None = None) -> Self:
        """`num_sequences` sequences of `length` tokens from position 0 that no cache remembers."""
        return cls._build([(0, length, None)] * num_sequences if length else [], device)

    @classmethod
    def dummy(cls, num_tokens: int, device: torch.device | str | None = None) -> Self:
        """One sequence from the zero state that no cache remembers: what an idle rank runs."""
        return cls.dense(1, num_tokens, device)

    @classmethod
    def _build(cls, items: list[tuple[int, int, "Sequence | None"]], device: torch.device | str | None) -> Self:
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
    def parts(self) -> tuple[Part, ...]:
        """The groups as the mixers take them."""
        members: dict[tuple[bool, bool], list[Group]] = {}
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
        """Where each row of the step stands among the rows of its parts, one part after another."""
        return torch.cat([part.rows_T for part in self.parts]).argsort()

    @property
    def sequences(self) -> list[tuple["Sequence", int]]:
        """The cached sequences with their numbers of new tokens."""
        return [(sequence, group.length) for group in self.groups for sequence in group.sequences]
