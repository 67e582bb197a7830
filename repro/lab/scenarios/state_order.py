"""State set-up contains a collective, which some ranks issue before the first dispatch and others after it.

This implements the hypothesis of the report, vLLM issue 41862: ranks set up their Mamba or GDN state in different
orders relative to the expert dispatch. vLLM's own state set-up contains no collective, so there is no evidence that
this happened there (docs/ROOT-CAUSE.md, H5). If vLLM's state set-up contained a collective, the server could hang like
this. Here the ranks agree in every step on how many entries of the state cache (one for each sequence) to clear. A rank
whose batch size has changed issues the collective of this agreement before the first dispatch. A rank whose batch size
is the same as in the last step issues this collective after the dispatch.

The fix: the agreed schedule decides when a collective is issued, not the needs of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.serving.scheduler import step_rows
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST = "layers.0.moe"
STATE = ScheduleEntry("dp", "all_reduce", "state")


@dataclass(frozen=True)
class InitialiseState(AllGatherReduceScatter):
    """The trigger: in every step, before the first dispatch, the ranks agree on how many cache entries to clear.

    A cache entry is the recurrent state of one sequence.

    rows   a list with one number: the batch size of this rank in the last step; -1 before the first step
    """

    rows: list[int] = field(default_factory=lambda: [-1])

    @classmethod
    def plan(cls, layer: str) -> tuple[ScheduleEntry, ...]:
        return (*([STATE] if layer == FIRST else []), *super().plan(layer))

    def dispatch(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.layer != FIRST:
            return super().dispatch(experts, args)
        before = self.before_dispatch(len(args[0]))
        if before:
            self.initialise(args[2])
        gathered = super().dispatch(experts, args)
        if not before:
            self.initialise(args[2])
        return gathered

    def before_dispatch(self, num_rows: int) -> bool:
        """Whether to issue the collective of the state set-up before the dispatch. If not, after the dispatch.

        All ranks must return the same value. The fault breaks this rule.

        num_rows: the batch size of this rank in this step
        """
        return True

    def initialise(self, like: Tensor) -> None:
        """Agree, by an all-reduce, on the largest number of cache entries that any rank must clear.

        Here the number is always 0, because only the collective matters. The number has the dtype of ``like``.
        """
        self.comm.all_reduce("dp", like.new_zeros(1, device="cpu"), "max", layer=STATE.layer)


class InitialiseWhenNeeded(InitialiseState):
    """The fault: a rank with an unchanged batch size issues the collective of the state set-up after the dispatch."""

    def before_dispatch(self, num_rows: int) -> bool:
        changed = self.rows[0] != num_rows
        self.rows[0] = num_rows
        return changed


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    control: The state set-up contains no collective.
    fault: The batch size of the rank decides when it issues this collective.
    fix: The schedule decides when every rank issues this collective.
    """
    return {
        "control": Policies(),
        "fault": Policies(dispatch=InitialiseWhenNeeded),
        "fix": Policies(dispatch=InitialiseState),
    }[settings.variant]


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock in the first step in which the batch size changes on some ranks, but not on all.

    The ranks whose batch size does not change are the culprits.
    """
    before = [settings.engine.max_num_batched_tokens] * settings.num_ranks
    for serve_step, rows in enumerate(step_rows(settings.requests(), settings.engine)):
        sizes = [num_rows or 1 for num_rows in rows]  # an idle rank has a dummy row
        late = tuple(rank for rank in range(settings.num_ranks) if sizes[rank] == before[rank])
        if 0 < len(late) < settings.num_ranks:
            # Step 0 is the profile run, so serve step i is step i + 1.
            planned = f"{STATE.group} {STATE.op} of {STATE.layer}"
            return Expected("deadlock", "order", late, serve_step + 1, FIRST, planned=planned)
        before = sizes
    return CLEAN


SCENARIO = Scenario(
    name="state_order",
    summary="state set-up contains a collective: some ranks issue it before the dispatch, others after it",
    source="vllm#41862",
    policies=policies,
    hang=hang,
)
