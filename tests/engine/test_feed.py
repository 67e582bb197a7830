"""What the ranks of a tp group feed is compared by hash, and a difference is reported with its ranks and numbers."""

from __future__ import annotations

import pytest

from hybrid_moe_ref.engine.step.feed import Feed, feed_differences, feed_hash, from_text, to_text

A = Feed("a", 0, (7, 8, 9))


@pytest.mark.parametrize(
    "other", [(), [Feed("b", 0, A.tokens)], [Feed("a", 1, A.tokens)], [Feed("a", 0, (7, 8, 1))], [A, A]]
)
def test_the_hash_tells_apart_ids_positions_tokens_and_numbers_of_requests(other):
    assert feed_hash([A]) == feed_hash([Feed("a", 0, (7, 8, 9))]) != feed_hash(other)


def test_feeds_survive_the_way_through_text():
    feeds = (A, Feed('odd "name"\n', 3, (1,)))
    assert from_text(to_text(feeds)) == feeds


@pytest.mark.parametrize(
    ("feeds", "tp_size", "lines"),
    [
        ([[A], [A]], 2, []),
        ([[A], [A, Feed("b", 4, (1, 2))]], 2, ["tp group 0,1: rank 1 has 5 tokens of a, b, rank 0 has 3 tokens of a"]),
        ([[A], [A], [], []], 2, []),
        (
            [[A], [A], [A], [Feed("dummy", 0, (0,))]],
            4,
            ["tp group 0,1,2,3: rank 3 has 1 token of dummy, ranks 0,1,2 have 3 tokens of a"],
        ),
        (
            [[A], [A], [A], [Feed("a", 0, (7, 5, 9))]],
            2,
            ["tp group 2,3: rank 3 has token 5 at position 1 of a, rank 2 has token 8 at position 1 of a"],
        ),
        (
            [[A], [Feed("a", 2, A.tokens)]],
            2,
            ["tp group 0,1: rank 1 has token 7 at position 2 of a, rank 0 has token 7 at position 0 of a"],
        ),
    ],
)
def test_each_group_that_differs_is_one_line_with_the_fewest_ranks_first(feeds, tp_size, lines):
    assert list(feed_differences(feeds, tp_size)) == lines
