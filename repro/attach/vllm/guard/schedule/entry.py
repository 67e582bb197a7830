"""An entry: one collective that a rank issues. Ranks compare entries by 64-bit digests."""

from __future__ import annotations

import functools
from hashlib import blake2b
from typing import NamedTuple

AGREEMENT = "the step agreement"
"""The text in the field ``layer`` of an entry that is C1, the step agreement."""

MASK = 2**64 - 1
PRIME = 0x100000001B3


class Entry(NamedTuple):
    """One collective: vLLM's name of the group, the operation, and the layer that issued it ("" outside a layer).

    digest: a number of 64 bits that stands for these three
    """

    group: str
    op: str
    layer: str
    digest: int

    def words(self) -> str:
        """Return the entry as text: "dp.cpu all_reduce of model.layers.0.linear_attn"."""
        return f"{self.group} {self.op} of {self.layer}" if self.layer else f"{self.group} {self.op}"

    def key(self) -> tuple[str, str, str]:
        return self.group, self.op, self.layer


@functools.lru_cache(maxsize=65536)
def entry_of(group: str, op: str, layer: str) -> Entry:
    """Return the record of a collective. For the same arguments, the same object is returned.

    layer: the layer that issues the collective; "" outside a layer
    """
    return Entry(group, op, layer, digest_of(f"{group}\0{op}\0{layer}"))


def digest_of(text: str) -> int:
    """Return a number of 64 bits for a text. It is the same in every process, unlike Python's hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def joined(digest: int, other: int) -> int:
    """Return the digest (a number of 64 bits) of a sequence after one more element has been appended.

    digest: the digest of the sequence before; other: the digest of the element
    """
    return ((digest ^ other) * PRIME + 1) & MASK


def as_words(digest: int) -> tuple[int, int]:
    """Split a digest, a number of 64 bits, into two int32, the low half first, to send it in a tensor."""
    low, high = digest & 0xFFFFFFFF, digest >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
