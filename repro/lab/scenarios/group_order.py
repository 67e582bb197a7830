"""Ranks issue collectives of two groups in different orders: some the dp all-reduce first, others the ep dispatch.

Upstream: torchrec issue 4149, where collectives of two groups overlap and their order depends on rank-local timing.
Here every layer all-reduces the number of tokens of each expert over the dp group. A rank with many rows (tokens)
sends these statistics before its dispatch. A rank with few rows sends them after the combine. Within each group the
order of collectives is the same on every rank, so neither group alone looks wrong.

The fix: the agreed schedule decides when a collective is issued, not the local load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.serving.scheduler import step_rows
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

MANY_ROWS = 4


@dataclass(frozen=True)
class CountTokens(AllGatherReduceScatter):
    """The trigger: after the combine, each layer sums over all ranks how many tokens each expert got.

    counted   under the key "tokens_E", how many of this rank's tokens each expert got in the current step
    """

    counted: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def plan(cls, layer: str) -> tuple[ScheduleEntry, ...]:
        return (*super().plan(layer), ScheduleEntry("dp", "all_reduce", layer))

    def dispatch(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        num_experts = experts.get_parameter("gate_up_proj").shape[0] * len(self.comm.members("ep"))
        self.counted["tokens_E"] = args[2].flatten().bincount(minlength=num_experts).cpu()
        if self.counts_early():
            self.count()
        return super().dispatch(experts, args)

    def combine(self, experts: nn.Module, args: object, partial_SH: Tensor) -> Tensor:
        y_NH = super().combine(experts, args, partial_SH)
        if not self.counts_early():
            self.count()
        return y_NH

    def counts_early(self) -> bool:
        """Whether to all-reduce the numbers of tokens per expert before the dispatch. If not, after the combine.

        All ranks must return the same value. The fault breaks this rule.
        """
        return False

    def count(self) -> None:
        """All-reduce the number of tokens of each expert over the group `dp`."""
        self.comm.all_reduce("dp", self.counted["tokens_E"], layer=self.layer)


class CountEarlyUnderLoad(CountTokens):
    """The fault: a rank with many tokens issues the all-reduce before its dispatch, the others after the combine."""

    def counts_early(self) -> bool:
        return self.context.ep_sizes[self.comm.group_rank("ep")] > MANY_ROWS


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: No rank sends statistics (how many tokens each expert got).
    fault: The number of rows (tokens) of the rank decides when it sends the statistics.
    fix: The schedule decides when every rank sends the statistics.
    """
    return {
        "control": Policies(),
        "fault": Policies(dispatch=CountEarlyUnderLoad),
        "fix": Policies(dispatch=CountTokens),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which some ranks have many rows (tokens) and others few.

    The ranks with many rows are the culprits.
    """
    for serve_step, rows in enumerate(step_rows(settings.requests(), settings.engine)):
        early = tuple(rank for rank, num_rows in enumerate(rows) if num_rows > MANY_ROWS)
        if 0 < len(early) < settings.num_ranks:
            # Step 0 is the profile run, in which every rank has many rows.
            return Expected("deadlock", "order", early, serve_step + 1, "layers.0.moe")
    return CLEAN


SCENARIO = Scenario(
    name="group_order",
    summary="two groups are entered in an order that depends on local load: a cycle over both groups",
    source="torchrec#4149",
    policies=policies,
    hang=hang,
)
