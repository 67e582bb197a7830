"""Describe the tokens that a rank gives its model in one step, and compare them between tensor-parallel ranks.

The ranks of one tp group hold parts of the same layers, so they must run the same tokens of the same requests. With
different numbers of tokens, the first all-reduce of a layer aborts or hangs. With equally many but different tokens,
the answers are wrong and there is no error. We call these tokens the feed of the step. The step agreement (C1) contains
a hash of the feed. This file uses neither torch nor communication.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DUMMY = "dummy"
"""The request id in the feed of a rank without requests."""


@dataclass(frozen=True)
class Feed:
    """The tokens of one request in one step. The model has already processed ``start`` tokens of the request."""

    request_id: str
    start: int
    tokens: tuple[int, ...]


def feed_hash(feeds: Sequence[Feed]) -> int:
    """Return a 64-bit hash of a rank's feeds: request ids, numbers of earlier tokens, and tokens."""
    digest = hashlib.blake2b(digest_size=8)
    for feed in feeds:
        digest.update(f"{feed.request_id!r} {feed.start} {len(feed.tokens)} ".encode())
        digest.update(array("q", feed.tokens).tobytes())
    return int.from_bytes(digest.digest(), "big")


def to_text(feeds: Sequence[Feed]) -> str:
    """Write a rank's feeds as one line, which `from_text` reads."""
    return json.dumps([[feed.request_id, feed.start, feed.tokens] for feed in feeds])


def from_text(text: str) -> tuple[Feed, ...]:
    """Read the feeds from the text of `to_text`."""
    return tuple(Feed(request_id, start, tuple(tokens)) for request_id, start, tokens in json.loads(text))


def feed_differences(feeds_of_rank: Sequence[Sequence[Feed]], tp_size: int) -> Iterator[str]:
    """Yield a line for each tp group whose ranks run different tokens in one step.

    The line names the tp group, then each feed with the ranks that have it, first the feed of the fewest ranks.

    feeds_of_rank: the feeds of each rank, by rank
    """
    for first in range(0, len(feeds_of_rank), tp_size):
        sides: dict[tuple[Feed, ...], list[int]] = {}
        for rank in range(first, first + tp_size):
            sides.setdefault(tuple(feeds_of_rank[rank]), []).append(rank)
        if len(sides) > 1:
            yield f"tp group {_numbers(range(first, first + tp_size))}: {_difference(sides)}"


def _difference(sides: dict[tuple[Feed, ...], list[int]]) -> str:
    ordered = sorted(sides, key=lambda feeds: (len(sides[feeds]), -sides[feeds][0]))
    words = [_describe(feeds) for feeds in ordered]
    if len(set(words)) == 1:  # the same number of tokens of the same requests: name the first token that differs
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
