"""What a rank issues to its groups, one entry for each collective, and the 64-bit digests that ranks compare."""

from __future__ import annotations

import functools
from hashlib import blake2b
from typing import NamedTuple

AGREEMENT = "the step agreement"
"""The layer in the entry of C1."""

MASK = 2**64 - 1
PRIME = 0x100000001B3


class Entry(NamedTuple):
    """One collective: vLLM's name of the group, the operation, and the layer that issued it ("" outside a layer)."""

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
    """Return the entry, which is the same object for the same arguments."""
    return Entry(group, op, layer, digest_of(f"{group}\0{op}\0{layer}"))


def digest_of(text: str) -> int:
    """Return a number of 64 bits that is the same in every process, unlike Python's hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def joined(digest: int, other: int) -> int:
    """Add one more number to the digest of a sequence."""
    return ((digest ^ other) * PRIME + 1) & MASK


def as_words(digest: int) -> tuple[int, int]:
    """Return the digest as two int32, low and high."""
    low, high = digest & 0xFFFFFFFF, digest >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
