"""The number of ranks, and how they share a model."""

from dataclasses import dataclass

from hybrid_moe_ref.config.base import Config, ConfigError, at_least
from hybrid_moe_ref.config.model import ModelConfig


@dataclass(frozen=True)
class ParallelConfig(Config):
    """The layout: the number of ranks, and how they share the model.

    There are dp_size tp groups of tp_size ranks each.

    dp_size           number of tp groups; each has its own requests
    tp_size           number of ranks in each tp group, which share heads and intermediate features
    expert_parallel   True: whole routed experts are distributed over all ranks. False: every tp group has all experts,
                      and each of its ranks has a part of each expert
    """

    dp_size: int = 1
    tp_size: int = 1
    expert_parallel: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "dp_size", "tp_size")

    @property
    def ep_size(self) -> int:
        """Return the number of ranks over which whole routed experts are distributed; 1 if not `expert_parallel`."""
        return self.dp_size * self.tp_size if self.expert_parallel else 1

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp_size

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError if the experts of `model` cannot be divided evenly over the `ep_size` ranks."""
        if model.num_experts % self.ep_size:
            raise ConfigError(
                f"{model.num_experts} experts do not divide over {self.ep_size} ranks"
                f" (dp_size {self.dp_size} x tp_size {self.tp_size})",
                "ep_size",
            )
