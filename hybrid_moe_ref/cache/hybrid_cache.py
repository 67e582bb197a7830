"""The cache of a model: the KV entries and recurrent states of each sequence, in pages from one pool.

`pages.py` computes the sizes of pages. `pasts.py` defines what a layer sees of the cache.

Shapes: P pages, B sequences of a group of the batch, T new tokens, S tokens, K KV heads, D head dim.
"""

import weakref
from dataclasses import dataclass

import torch
from hybrid_moe_kernels.precision import wide
from torch import Tensor

from hybrid_moe_ref.batch import Batch, Group
from hybrid_moe_ref.cache.page_table import PageTable
from hybrid_moe_ref.cache.pages import PageLayout, page_layout
from hybrid_moe_ref.cache.pasts import KVPast, KVRun, Past, StatePast
from hybrid_moe_ref.config import ModelConfig


def cache_layout(config: ModelConfig, dtype: torch.dtype) -> PageLayout:
    """Return the page layout of a cache in `dtype`.

    Recurrent states are float64 if `dtype` is float64, otherwise float32.
    """
    return page_layout(config, dtype.itemsize, ssm_itemsize=wide(dtype).itemsize)


class CacheExhausted(RuntimeError):
    """There are not enough free pages. No page was taken, and the cache can still be used."""

    def __init__(self, needed: int, free: int, what: str) -> None:
        super().__init__(f"{what} needs {needed} pages, but only {free} are free")
        self.needed = needed
        self.free = free


@dataclass(eq=False)
class Sequence:
    """A cached sequence. Its pages return to the pool by `HybridCache.free`, or when no reference to it is left.

    pages   for each layer group (layers that share page numbers), the numbers of the sequence's pages
    row     the index of its row in the `PageTable`, which has the page numbers of all sequences on the device
    length  number of cached tokens
    """

    cache: "HybridCache"
    pages: list[list[int]]
    row: int
    length: int = 0

    def __post_init__(self) -> None:
        self.release = weakref.finalize(self, self.cache._give_back, self.pages, self.row)
        self.release.atexit = False

    @property
    def device(self) -> torch.device:
        """Return the device of the cache."""
        return self.cache.device


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of a sequence's length and recurrent states, for `HybridCache.restore`."""

    length: int
    states: list[Tensor]


class HybridCache:
    """A cache of `num_pages` pages for the sequences of one model.

    A step calls `pasts = cache.begin(batch)`, runs the layers, and calls `cache.commit(batch)`. `HybridMoE.step` does
    all of this. If a step fails between `begin` and `commit`, free the sequences of the step: some layers may have
    updated their recurrent states, and others not.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}, but must be at least 1")
        self.config, self.num_pages, self.dtype = config, num_pages, dtype
        self.ssm_dtype = wide(dtype)
        self.layout = cache_layout(config, dtype)
        self.buffers = [
            torch.zeros(num_pages, self.layout.page_bytes, dtype=torch.uint8, device=device)
            for _ in range(self.layout.group_size)
        ]
        self.device = self.buffers[0].device
        self._free = list(reversed(range(num_pages)))
        self._attention = [number for number, group in enumerate(self.layout.groups) if group.kind == "A"]
        self._recurrent = [number for number, group in enumerate(self.layout.groups) if group.kind != "A"]
        self._table = PageTable(len(self._attention), len(self._recurrent), self.device)
        # views[g][i] is buffer i in the form in which the i-th layer of group g reads it.
        self._views = [
            [self._view(group.kind, self.buffers[i]) for i in range(len(group.layers))] for group in self.layout.groups
        ]

    def _view(self, kind: str, buffer_P_: Tensor) -> tuple[Tensor, ...]:
        if kind == "A":
            kv = buffer_P_.view(self.dtype)
            return (kv.view(self.num_pages, self.layout.tokens, 2, self.config.num_key_value_heads, -1),)
        size = self.layout.states[kind]
        ssm = buffer_P_[:, : size.ssm_bytes].view(self.ssm_dtype).unflatten(1, size.ssm_shape)
        conv = buffer_P_[:, size.ssm_bytes : size.num_bytes].view(self.dtype).unflatten(1, size.conv_shape)
        return conv, ssm

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def allocate(self) -> Sequence:
        """Allocate an empty sequence.

        This takes the pages for the sequence's recurrent states. `begin` takes the pages for KV entries later.

        Raises CacheExhausted, before any page is taken, if too few pages are free.
        """
        counts = [0 if group.kind == "A" else 1 for group in self.layout.groups]
        self._need(sum(counts), "a new sequence")
        pages = [self._take(count) for count in counts]
        return Sequence(self, pages, self._table.add([pages[number][0] for number in self._recurrent]))

    def free(self, sequence: Sequence) -> None:
        """Return the sequence's pages to the pool. The sequence cannot be used after that."""
        self._check(sequence)
        sequence.release()

    def _give_back(self, pages_of_group: list[list[int]], row: int) -> None:
        for pages in pages_of_group:
            self._free.extend(reversed(pages))
            pages.clear()
        self._table.remove(row)

    def fork(self, sequence: Sequence) -> Sequence:
        """Return a copy of a sequence. The sequence and its copy can then continue with different tokens.

        Raises CacheExhausted, before any page is taken, if too few pages are free.
        """
        self._check(sequence)
        self._need(sum(map(len, sequence.pages)), f"a copy of a sequence of {sequence.length} tokens")
        copy = self.allocate()
        self._extend(copy, self._num_token_pages(sequence))
        copy.length = sequence.length
        for source, target in zip(sequence.pages, copy.pages, strict=True):
            for buffer in self.buffers:
                buffer[target] = buffer[source]
        return copy

    def snapshot(self, sequence: Sequence) -> Snapshot:
        """Return a copy of the sequence's length and recurrent states, with which `restore` can undo later tokens.

        KV entries are not saved, because `restore` shortens the sequence, and entries after its end are never used.
        """
        self._check(sequence)
        pages = self._state_pages(sequence)
        return Snapshot(sequence.length, [buffer[pages] for buffer in self.buffers])

    def restore(self, sequence: Sequence, snapshot: Snapshot) -> None:
        """Set a sequence's length and recurrent states back to those in `snapshot`, which is of the same sequence."""
        self._check(sequence)
        pages = self._state_pages(sequence)
        for buffer, states in zip(self.buffers, snapshot.states, strict=True):
            buffer[pages] = states
        sequence.length = snapshot.length

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Keep only the first `length` tokens of a sequence.

        Raises ValueError if the sequence has fewer tokens, or if the model has recurrent states.
        """
        self._check(sequence)
        if self.layout.states or length > sequence.length:
            raise ValueError(f"a sequence of {sequence.length} tokens cannot be truncated to {length}")
        sequence.length = length

    def _state_pages(self, sequence: Sequence) -> list[int]:
        return [
            page for g, pages in zip(self.layout.groups, sequence.pages, strict=True) if g.kind != "A" for page in pages
        ]

    def check_model(self, config: ModelConfig, dtype: torch.dtype) -> None:
        """Raise ValueError if the cache was not made for a model with this configuration and dtype."""
        if dtype != self.dtype:
            raise ValueError(f"the cache has dtype {self.dtype}, but the model has {dtype}")
        if config is not self.config and config != self.config:
            ours, theirs = self.config.to_mapping(), config.to_mapping()
            name = next(name for name in ours if ours[name] != theirs[name])
            raise ValueError(f"the cache was made for {name} {ours[name]!r}, but the model has {name} {theirs[name]!r}")

    def begin(self, batch: Batch[Sequence]) -> list[list[Past]]:
        """Take pages for the new tokens of a batch. Returns what each layer sees of the cache.

        For each layer, this is a list of `Past` objects: one for each group of cached sequences with the same number of
        new tokens.

        Raises CacheExhausted, before any page is taken, if too few pages are free. Raises ValueError if the batch was
        built before the last step of its sequences, or if a sequence was freed or belongs to a different cache.
        """
        missing: list[tuple[Sequence, int]] = []
        for sequence, count in batch.sequences:
            self._check(sequence)
            if self._attention:
                pages_needed = -(-(sequence.length + count) // self.layout.tokens)
                if pages_needed > (held := self._num_token_pages(sequence)):
                    missing.append((sequence, pages_needed - held))
        for rows in batch.groups:
            if rows.sequences and rows.starts != tuple(sequence.length for sequence in rows.sequences):
                raise ValueError("the batch is outdated: it was built before the last step of its sequences")
        num_pages = sum(count for _, count in missing) * len(self._attention)
        self._need(num_pages, f"a step of {batch.num_tokens} tokens")
        for sequence, count in missing:
            self._extend(sequence, count)

        pasts: list[list[Past]] = [[] for _ in self.config.layer_pattern]
        for rows in batch.groups:
            if rows.sequences:
                row_B = torch.tensor([sequence.row for sequence in rows.sequences], device=self.device)
                for index, number in enumerate(self._recurrent):
                    self._bind_states(number, self._table.slots(index, row_B), pasts)
                for index, number in enumerate(self._attention):
                    self._bind_tokens(rows, index, number, row_B, pasts)
        return pasts

    def _num_token_pages(self, sequence: Sequence) -> int:
        """Return how many pages a sequence has in a layer group (layers that share page numbers) of attention layers.

        The number is the same in all these groups.
        """
        return len(sequence.pages[self._attention[0]]) if self._attention else 0

    def _extend(self, sequence: Sequence, count: int) -> None:
        """Take `count` more pages for a sequence, in each layer group (layers that share page numbers) of attention."""
        if not count:
            return
        start, new = self._num_token_pages(sequence), [self._take(count) for _ in self._attention]
        for number, pages in zip(self._attention, new, strict=True):
            sequence.pages[number].extend(pages)
        self._table.extend(sequence.row, start, new)

    def commit(self, batch: Batch[Sequence]) -> None:
        """Add, to the length of each sequence of the batch, its number of new tokens."""
        for sequence, count in batch.sequences:
            sequence.length += count

    def _bind_states(self, number: int, slots_B: Tensor, pasts: list[list[Past]]) -> None:
        for layer, (conv, ssm) in zip(self.layout.groups[number].layers, self._views[number], strict=True):
            pasts[layer].append(StatePast(conv, ssm, slots_B))

    def _bind_tokens(
        self, rows: Group[Sequence], index: int, number: int, row_B: Tensor, pasts: list[list[Past]]
    ) -> None:
        layers, views = self.layout.groups[number].layers, self._views[number]
        length = max(rows.starts) + rows.length
        lengths_B = rows.positions_BT[:, -1] + 1
        one = rows.sequences[0].pages[number] if len(rows.sequences) == 1 else []
        if one and one == list(range(one[0], one[0] + len(one))):
            table_11 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            for layer, (kv,) in zip(layers, views, strict=True):
                kv_1S2KD = kv[one[0] : one[0] + len(one)].flatten(0, 1)[None, :length]
                pasts[layer].append(KVRun(kv_1S2KD, rows.starts[0], table_11, lengths_B, length))
            return
        table_BP = self._table.pages(index, row_B, max(len(sequence.pages[number]) for sequence in rows.sequences))
        page_BT = table_BP.gather(1, rows.positions_BT // self.layout.tokens)
        offset_BT = rows.positions_BT % self.layout.tokens
        for layer, (kv,) in zip(layers, views, strict=True):
            pasts[layer].append(KVPast(kv, page_BT, offset_BT, table_BP, lengths_B, length))

    def _check(self, sequence: Sequence) -> None:
        if sequence.cache is not self:
            raise ValueError("the sequence belongs to a different cache")
        if not sequence.release.alive:
            raise ValueError("the sequence was freed")

    def _need(self, count: int, what: str) -> None:
        if count > len(self._free):
            raise CacheExhausted(count, len(self._free), what)

    def _take(self, count: int) -> list[int]:
        """Take pages and fill them with zeros, because states start from zero and masked KV entries must be finite."""
        pages = [self._free.pop() for _ in range(count)]
        if pages:
            for buffer in self.buffers:
                buffer[pages] = 0
        return pages
