"""One rank dispatches with the sizes that all ranks had in an earlier step, because its own size has not changed.

Upstream: TensorRT-LLM issue 16745. If all ranks have the same number of rows, the dispatch is one all-gather, else one
broadcast per rank. Each rank decides this from a list of all ranks' sizes, and keeps this list for the next steps. To
see whether its list is still valid, a rank checks only its own size. A rank with a stale list issues a different
operation than the other ranks, or the same operation with different lengths. The result depends on the backend:

- NCCL hangs.
- gloo hangs if the operations differ. If a rank receives more bytes than its buffer holds, gloo ends this rank by
  SIGABRT. If the buffer is too large, gloo returns wrong data.

The fix: every rank and every layer uses the sizes of the step agreement (the first all-reduce of a step). With
`--checks agree`, a rank refuses to issue a collective with different sizes. With `--checks strict`, the ranks also
compare their sizes before each collective.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.serving.scheduler import step_rows
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class GatherOrBroadcast(AllGatherReduceScatter):
    """The trigger: the dispatch is one all-gather if all ranks have equally many rows, else one broadcast per rank."""

    def dispatch(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        sizes = self.sizes(len(args[0]))
        return tuple(self.comm.all_gather_v("ep", args, sizes, layer=self.layer, broadcast_uneven=True))

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Return the number of rows (tokens) of every rank, as agreed for this step.

        num_rows: how many rows this rank has in this step; only the fault uses it
        """
        return self.context.ep_sizes


@dataclass(frozen=True)
class KeepSizes(GatherOrBroadcast):
    """The fault: a rank that has as many rows as in an earlier step reuses the list of sizes of that step.

    kept   for each number of rows that this rank has had, the sizes of all ranks in the first step with this number
    """

    kept: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        return self.kept.setdefault(num_rows, self.context.ep_sizes)


def first_stale(settings: RunSettings) -> tuple[int, int] | None:
    """Return (step, rank): the first step in which a rank would use a stale list of sizes, and this rank.

    A list is stale if another rank had a different size in the earlier step from which the list comes. Step 0 is the
    first step of the phase `serve`. If several ranks would use a stale list in this step, the seed selects one of these
    ranks. Returns None if no rank would ever use a stale list.
    """
    kept: list[dict[int, list[int]]] = [{} for _ in range(settings.num_ranks)]
    for serve_step, rows in enumerate(step_rows(settings.requests(), settings.engine)):
        sizes = [num_rows or 1 for num_rows in rows]  # an idle rank has a dummy row
        stale = [rank for rank, lists in enumerate(kept) if lists.setdefault(sizes[rank], sizes) != sizes]
        if stale:
            return serve_step, random.Random(settings.seed).choice(stale)
    return None


def policies(settings: RunSettings, rank: int) -> Policies:
    """Return the policies of a rank, which are the objects that decide for its engine.

    In the fault, one rank reuses the sizes of an earlier step. In control and fix, all ranks use the agreed sizes.
    """
    first = first_stale(settings) if settings.variant == "fault" else None
    return Policies(dispatch=KeepSizes if first is not None and first[1] == rank else GatherOrBroadcast)


def hang(settings: RunSettings) -> Expected:
    """Predict a deadlock with NCCL and a crash with gloo. With gloo, `deadlock` and `corrupt` are accepted, too.

    The culprit is the rank with the stale list of sizes: the lists of all other ranks are equal.
    """
    first = first_stale(settings)
    if first is None:
        return CLEAN
    serve_step, rank = first
    # Step 0 is the profile run, so serve step i is step i + 1.
    hangs = Expected("deadlock", "sizes", (rank,), serve_step + 1, "layers.0.moe")
    if settings.backend != "gloo":
        return hangs
    # The rank that gloo ends need not be the culprit, and the other ranks may pass another collective before they fail.
    corrupts = Expected("corrupt", "sizes", (rank,), serve_step + 1)
    return Expected("crash", "sizes", (rank,), serve_step + 1, or_else=dataclasses.replace(hangs, or_else=corrupts))


SCENARIO = Scenario(
    name="size_vector",
    summary="one rank dispatches by a stale list of sizes: another operation or length on one communicator",
    source="TensorRT-LLM#16745",
    policies=policies,
    hang=hang,
)
