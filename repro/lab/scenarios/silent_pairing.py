"""One rank sums a layer's output twice. Its second all-reduce pairs with the others' all-reduce of the next layer.

Nothing hangs, but the numbers are wrong.

Upstream: NCCL issue 1417 asks why mismatched all-reduces hang in some cases, and return wrong numbers in other cases.
Under tensor parallelism a step is a sequence of all-reduces of one shape in one group. A rank that issues one
all-reduce too many does not hang. For the rest of the run, each all-reduce adds this rank's output of one layer to the
other ranks' output of the next layer. Here one rank has a fused all-reduce that does not support a batch of one row:
this all-reduce fails after it has summed. The rank then issues the plain all-reduce, which sums the result again.

The fix: choose between the fused and the plain all-reduce before anything is sent. With `--checks agree`, a rank
refuses the extra all-reduce, because it is not the next entry of the schedule. With `--checks strict`, the ranks also
compare their layers before each all-reduce.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.serving.scheduler import step_rows
from hybrid_moe_ref.engine.step.protocol import protocol_of
from hybrid_moe_ref.parallel.sharding.dispatch import SumOverRanks
from repro.lab.scenarios import Expected, Scenario, struck_rank
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


LAYER = "layers.0.moe"


@dataclass(frozen=True)
class FallBack(SumOverRanks):
    """The trigger: the fused all-reduce of one layer fails at the first batch of one row, which it does not support.

    failed   contains the name of this layer after the failure, so that the fused all-reduce fails only once
    """

    failed: set[str] = field(default_factory=set)

    def combine(self, module: nn.Module, args: object, partial_NH: Tensor) -> Tensor:
        if self.layer != LAYER or len(partial_NH) > 1 or self.failed:
            return self.add_up(partial_NH)
        self.failed.add(LAYER)
        return self.fall_back(partial_NH)

    def fall_back(self, partial_NH: Tensor) -> Tensor:
        """Sum over the tp group by the plain all-reduce, after the fused all-reduce has refused this batch of one row.

        partial_NH: this rank's part of the layer's output, [1 row, hidden size]
        """
        return self.add_up(partial_NH)

    def add_up(self, partial_NH: Tensor) -> Tensor:
        """Sum over the tp group by one all-reduce. Used as the fused all-reduce, and also as the plain one.

        partial_NH: this rank's part of the layer's output, [rows, hidden size]
        """
        return self.comm.all_reduce("tp", partial_NH.contiguous(), layer=self.layer)


class AddAgain(FallBack):
    """The fault: the fused all-reduce fails after it has summed, and the plain all-reduce sums the result again."""

    def fall_back(self, partial_NH: Tensor) -> Tensor:
        return self.add_up(self.add_up(partial_NH))


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: No rank has a fused all-reduce.
    fault: The fused all-reduce of one rank fails after it has summed.
    fix: The fused all-reduce of one rank fails before it sends anything.
    """
    if settings.variant == "control" or rank != struck_rank(settings):
        return Policies()
    return Policies(adder=AddAgain if settings.variant == "fault" else FallBack)


def hang(settings: RunSettings) -> Expected:
    """Predict the verdict `corrupt`: from the first batch of one row on, the numbers are wrong.

    At the end the culprit waits alone: it issues one all-reduce more than the other ranks, which have completed all of
    theirs.
    """
    num_steps = protocol_of(settings.engine).last_step(len(step_rows(settings.requests(), settings.engine)))
    layer = f"layers.{settings.model.num_layers - 1}.moe"
    return Expected("corrupt", "extra", (struck_rank(settings),), num_steps, layer)


SCENARIO = Scenario(
    name="silent_pairing",
    summary="an extra all-reduce of one rank pairs with the others' next one: wrong numbers, and no hang",
    source="NVIDIA/nccl#1417",
    policies=policies,
    hang=hang,
    # All ranks share the tokens, so that every collective is the same all-reduce. One request at a time keeps the
    # number of rows at one. 8 heads and groups are divided over 8 ranks, so all sums have one shape.
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
