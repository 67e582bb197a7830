"""Draw requests for every rank from a seed: uneven lengths, staggered arrivals, ranks that become idle early."""

from __future__ import annotations

import random
from dataclasses import dataclass

from hybrid_moe_ref.config import Config, ConfigError
from hybrid_moe_ref.engine.serving.scheduler import Request


@dataclass(frozen=True)
class WorkloadConfig(Config):
    """The bounds of the requests that :func:`draw_requests` draws, all inclusive.

    ``max_requests`` is per rank; ``max_prompt_tokens`` and ``max_new_tokens`` are per request.

    The first request of each rank arrives at step 0, so that all ranks start busy. Later requests arrive at the latest
    at step ``max_arrival_step``. Some ranks, at least one and at most ``max_idle_ranks``, get only one request of at
    most ``short_new_tokens`` new tokens. These ranks become idle while the other ranks still work, as is usual in a DP
    server.
    """

    max_requests: int = 3
    max_prompt_tokens: int = 12
    max_new_tokens: int = 9
    max_arrival_step: int = 8
    short_new_tokens: int = 3
    max_idle_ranks: int = 3

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_prompt_tokens", "short_new_tokens", "max_idle_ranks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is less than 1", name)
        if self.max_arrival_step < 0:
            raise ConfigError(f"{self.max_arrival_step} is less than 0", "max_arrival_step")
        if self.max_new_tokens <= self.short_new_tokens:
            raise ConfigError(
                f"{self.max_new_tokens} is not more than short_new_tokens ({self.short_new_tokens}), so all ranks "
                "would end at the same time",
                "max_new_tokens",
            )


def draw_requests(config: WorkloadConfig, num_ranks: int, vocab_size: int, seed: int) -> list[list[Request]]:
    """Draw the requests of each rank at random. The same arguments give the same requests on every machine."""
    rng = random.Random(seed)
    most_idle = min(config.max_idle_ranks, num_ranks - 1)
    num_idle = rng.randint(min(1, most_idle), most_idle)
    idle = set(rng.sample(range(num_ranks), num_idle))
    return [_draw_rank(config, rank, rank in idle, vocab_size, rng) for rank in range(num_ranks)]


def _draw_rank(config: WorkloadConfig, rank: int, idle: bool, vocab_size: int, rng: random.Random) -> list[Request]:
    requests = []
    for index in range(1 if idle else rng.randint(1, config.max_requests)):
        shortest = 1 if idle else config.short_new_tokens + 1
        longest = config.short_new_tokens if idle else config.max_new_tokens
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, config.max_prompt_tokens))]
        arrival = 0 if index == 0 else rng.randint(0, config.max_arrival_step)
        requests.append(Request(f"rank{rank}-{index}", tuple(prompt), rng.randint(shortest, longest), arrival))
    return requests
