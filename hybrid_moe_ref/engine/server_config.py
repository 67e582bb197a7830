"""What every rank of a server must be given alike."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from hybrid_moe_ref.config import Config, ConfigError, EngineConfig, ModelConfig, ParallelConfig, nearest
from hybrid_moe_ref.parallel.shares import expert_sharing, local_config

CHECKS = ("observe", "agree", "strict")
"""How strongly ranks are kept in step.

observe  an observer is told of every collective, and nothing is refused
agree    C1 compares the schedules of all ranks, and the requests and tokens of the ranks of a tp group; each rank is
         held to its schedule: a collective that is not the schedule's next entry is refused before it is issued
strict   besides, all members of a collective compare it through the store before it is issued, sizes and all
"""


@dataclass(frozen=True)
class ServerConfig(Config):
    """The model, its layout, the bounds of the serve loop, the seed of random weights, and one of CHECKS.

    ``checkpoint`` is a folder in Hugging Face's format; "" draws the weights from ``seed``. ``allow_unsafe`` starts
    what would be refused because nothing keeps it free of deadlock (see `refusal`).
    """

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    seed: int = 0
    checks: str = "agree"
    checkpoint: str = ""
    allow_unsafe: bool = False

    def __post_init__(self) -> None:
        if self.checks not in CHECKS:
            raise ConfigError(f"unknown strength {self.checks!r}{nearest(self.checks, CHECKS)}", "checks")
        self.parallel.check(self.model)
        if self.engine.num_drafts and not self.model.num_mtp_layers:
            raise ConfigError(
                f"{self.engine.num_drafts} drafts, but the model has no MTP layer (model.num_mtp_layers is 0)",
                "engine.num_drafts",
            )
        if self.parallel.tp_size > 1:
            local_config(self.model, self.parallel.tp_size, expert_sharing(self.parallel))

    def digest(self) -> int:
        """31 bits that differ, with near certainty, when any value does."""
        text = json.dumps(self.to_mapping(), sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
