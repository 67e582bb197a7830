"""How to test a dispatcher of your own for hangs.

    pip install -e .            # this repository, which brings the fixture
    pytest examples/test_dispatcher.py

`UnevenDispatcher` stands for third-party code: it knows nothing of this project. Its `skip_empty` is a bug that
several servers had: a rank without tokens returns early, and the others wait for it.
"""

import torch
import torch.distributed as dist

from repro.attach.harness import DeadlockError, Rank, assert_no_deadlock

HIDDEN = 16


class UnevenDispatcher:
    """Sends token i of a rank to rank i % world, and back."""

    def __init__(self, group, skip_empty: bool = False) -> None:
        self.group, self.skip_empty = group, skip_empty
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def dispatch(self, x_NH: torch.Tensor) -> torch.Tensor:
        if self.skip_empty and len(x_NH) == 0:
            return x_NH  # the bug: the others count on this rank
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(x_NH)
        dist.all_reduce(counts, group=self.group)
        sends = [len(x_NH[r :: self.world]) for r in range(self.world)]
        receives = [len(range(self.rank, int(n), self.world)) for n in counts]
        ordered = torch.cat([x_NH[r :: self.world] for r in range(self.world)])
        received = x_NH.new_empty(sum(receives), HIDDEN)
        dist.all_to_all_single(received, ordered, receives, sends, group=self.group)
        return received


def exchange(rank: Rank, tokens_of_rank: list[int], skip_empty: bool) -> float:
    dispatcher = UnevenDispatcher(rank.world, skip_empty)
    x_NH = torch.full((tokens_of_rank[rank.rank], HIDDEN), float(rank.rank), device=rank.device)
    with assert_no_deadlock("dispatch"):
        return float(dispatcher.dispatch(x_NH).sum())


def test_every_token_arrives_also_with_an_empty_rank(ep_ranks):
    tokens = [5, 0, 3, 2]
    sums = ep_ranks(4, "gloo").run(lambda rank: exchange(rank, tokens, skip_empty=False))
    assert sum(sums) == sum(r * n * HIDDEN for r, n in enumerate(tokens))


def test_what_a_hang_looks_like(ep_ranks):
    """In a test of your own you would not catch it: the text below is the failure message."""
    try:
        ep_ranks(4, "gloo").run(lambda rank: exchange(rank, [5, 0, 3, 2], skip_empty=True))
    except DeadlockError as verdict:
        print(verdict)
        assert "ranks 0,2,3 wait in world all_reduce #1" in str(verdict)
    else:
        raise AssertionError("the bug was not found")
