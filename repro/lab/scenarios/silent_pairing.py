"""One rank adds up a layer's output twice: its second all-reduce pairs with the others' next one. Nothing hangs.

Mirrors what NCCL issue 1417 asks about: mismatched all-reduces hang in some cases, and in others just return wrong
numbers. Under tensor parallelism a step is one all-reduce after another in one group, all of one shape, so a rank that
issues one too many stays in step with its peers: each of its sums is made of its own part of one layer and of theirs of
the next, for the rest of the run. Here the fused all-reduce of one rank cannot finish for a single row, and the plain
path that takes over adds up once more what had been added.

The cure: which path is taken is settled before anything is sent. The guard refuses the extra all-reduce, which is
not the schedule's next entry; the strict check compares layers before each one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.scheduler import step_rows
from hybrid_moe_ref.parallel.dispatch import SumOverRanks
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


LAYER = "layers.0.moe"


@dataclass(frozen=True)
class FallBack(SumOverRanks):
    """The trigger: the fused path of a layer cannot do a single row, which shows when the first one comes."""

    failed: set[str] = field(default_factory=set)

    def combine(self, module: nn.Module, args: object, partial_NH: Tensor) -> Tensor:
        if self.layer != LAYER or len(partial_NH) > 1 or self.failed:
            return self.add_up(partial_NH)
        self.failed.add(LAYER)
        return self.fall_back(partial_NH)

    def fall_back(self, partial_NH: Tensor) -> Tensor:
        """The cure: the fused path declines before it has sent anything, and the plain one adds up."""
        return self.add_up(partial_NH)

    def add_up(self, partial_NH: Tensor) -> Tensor:
        """One all-reduce, fused or plain."""
        return self.comm.all_reduce("tp", partial_NH.contiguous(), layer=self.layer)


class AddAgain(FallBack):
    """The fault: the fused path fails after it has added up, and the plain one starts from what it left."""

    def fall_back(self, partial_NH: Tensor) -> Tensor:
        return self.add_up(self.add_up(partial_NH))


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: no fused path; fault: one rank's fails late; fix: it fails early."""
    if settings.variant == "control" or rank != struck_rank(settings):
        return Policies()
    return Policies(adder=AddAgain if settings.variant == "fault" else FallBack)


def hang(settings: RunSettings) -> Expected:
    """Wrong numbers from the first single row on. The culprit ends up waiting in the last all-reduce of the run, which
    the others have behind them.
    """
    interval = settings.engine.unfinished_interval
    num_steps = -(-len(step_rows(settings.requests(), settings.engine)) // interval) * interval
    layer = f"layers.{settings.model.num_layers - 1}.moe"
    return Expected("corrupt", "extra", (struck_rank(settings),), num_steps, layer)


SCENARIO = Scenario(
    name="silent_pairing",
    summary="an extra all-reduce of one rank pairs with the others' next one: wrong numbers, and no hang",
    source="NVIDIA/nccl#1417",
    policies=policies,
    hang=hang,
    # All ranks share the tokens, so that every collective is the same all-reduce; one request at a time keeps the
    # number of rows at one, and 8 heads and groups can be cut into 8 parts without sums of another shape.
    defaults={
        "tp_size": 8,
        "model": {
            "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "mamba_num_groups": 8, "mamba_state_size": 8,
        },
        "engine": {"unfinished_interval": 16},
        "workload": {"max_requests": 1},
    },
)  # fmt: skip
