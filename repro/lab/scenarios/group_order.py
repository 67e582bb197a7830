"""Ranks enter two groups in different orders: the load statistics before the dispatch here, after the combine there.

Mirrors torchrec issue 4149: collectives of two groups overlap, and their order follows from rank-local
timing. Here every layer all-reduces how many tokens each expert was given, over the dp group. A rank with
many rows sends the statistics off first, to hide them behind its long dispatch; a rank with few sends them after the
combine. Each group sees its collectives in one order on every rank, so neither looks wrong on its own.

The cure: the place of a collective in the step follows from the schedule that all agreed on, not from local load.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.scheduler import step_rows
from hybrid_moe_ref.parallel.dispatch import AllGatherReduceScatter
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

MANY_ROWS = 4


@dataclass(frozen=True)
class CountTokens(AllGatherReduceScatter):
    """The trigger: each layer sums over all ranks how many tokens its experts were given, after the combine."""

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
        """Whether to count before the dispatch; all ranks must answer alike."""
        return False

    def count(self) -> None:
        """The statistics' all-reduce."""
        self.comm.all_reduce("dp", self.counted["tokens_E"], layer=self.layer)


class CountEarlyUnderLoad(CountTokens):
    """The fault: where in the step the all-reduce comes depends on how many rows this rank has."""

    def counts_early(self) -> bool:
        return self.context.ep_sizes[self.comm.group_rank("ep")] > MANY_ROWS


def policies(settings: RunSettings, rank: int) -> Policies:
    """control: no statistics; fault: placed by local load; fix: placed by the schedule."""
    return {
        "control": Policies(),
        "fault": Policies(dispatch=CountEarlyUnderLoad),
        "fix": Policies(dispatch=CountTokens),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """The first step in which some ranks have many rows and others few; the early ones leave the schedule."""
    for serve_step, rows in enumerate(step_rows(settings.requests(), settings.engine)):
        early = tuple(rank for rank, num_rows in enumerate(rows) if num_rows > MANY_ROWS)
        if 0 < len(early) < settings.num_ranks:
            # Step 0 is the profile run, in which every rank has many rows.
            return Expected("deadlock", "order", early, serve_step + 1, "layers.0.moe")
    return CLEAN


SCENARIO = Scenario(
    name="group_order",
    summary="two groups entered in an order that depends on local load: a cycle over both",
    source="torchrec#4149",
    policies=policies,
    hang=hang,
)
