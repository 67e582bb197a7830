"""What a rank feeds its model in one step, and how the feeds of tensor-parallel ranks differ.

The ranks of one tp group hold parts of the same layers, so they must run the same tokens of the same requests. A
different number of tokens aborts or hangs in the first all-reduce of a layer. Different tokens of the same number give
wrong answers, and no error. So C1 carries a hash of the feed. No torch, no communication.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DUMMY = "dummy"
"""The request of a rank that has none."""


@dataclass(frozen=True)
class Feed:
    """The tokens of one request in one step; the model has seen ``start`` tokens of it before."""

    request_id: str
    start: int
    tokens: tuple[int, ...]


def feed_hash(feeds: Sequence[Feed]) -> int:
    """64 bits that are equal on two ranks, with near certainty, only when they run the same."""
    digest = hashlib.blake2b(digest_size=8)
    for feed in feeds:
        digest.update(f"{feed.request_id!r} {feed.start} {len(feed.tokens)} ".encode())
        digest.update(array("q", feed.tokens).tobytes())
    return int.from_bytes(digest.digest(), "big")


def to_text(feeds: Sequence[Feed]) -> str:
    """Feeds as one line that `from_text` reads."""
    return json.dumps([[feed.request_id, feed.start, feed.tokens] for feed in feeds])


def from_text(text: str) -> tuple[Feed, ...]:
    """The inverse of `to_text`."""
    return tuple(Feed(request_id, start, tuple(tokens)) for request_id, start, tokens in json.loads(text))


def feed_differences(feeds_of_rank: Sequence[Sequence[Feed]], tp_size: int) -> Iterator[str]:
    """A line for each tp group whose ranks feed differently: first the ranks that are fewest, then all others."""
    for first in range(0, len(feeds_of_rank), tp_size):
        sides: dict[tuple[Feed, ...], list[int]] = {}
        for rank in range(first, first + tp_size):
            sides.setdefault(tuple(feeds_of_rank[rank]), []).append(rank)
        if len(sides) > 1:
            yield f"tp group {_numbers(range(first, first + tp_size))}: {_difference(sides)}"


def _difference(sides: dict[tuple[Feed, ...], list[int]]) -> str:
    ordered = sorted(sides, key=lambda feeds: (len(sides[feeds]), -sides[feeds][0]))
    words = [_describe(feeds) for feeds in ordered]
    if len(set(words)) == 1:  # as many tokens of the same requests: name the first that differs
        places = zip(*(_places(feeds) for feeds in ordered), strict=True)
        words = next([f"token {token} at position {position} of {name}" for name, position, token in place]
                     for place in places if len(set(place)) > 1)  # fmt: skip
    return ", ".join(f"{_ranks(sides[feeds])} {text}" for feeds, text in zip(ordered, words, strict=True))


def _describe(feeds: Sequence[Feed]) -> str:
    num_tokens = sum(len(feed.tokens) for feed in feeds)
    names = ", ".join(feed.request_id for feed in feeds)
    return f"{num_tokens} token{'s' * (num_tokens != 1)} of {names}"


def _places(feeds: Sequence[Feed]) -> list[tuple[str, int, int]]:
    return [(feed.request_id, feed.start + i, token) for feed in feeds for i, token in enumerate(feed.tokens)]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {_numbers(ranks)} have"


def _numbers(ranks: Sequence[int]) -> str:
    return ",".join(map(str, ranks))
