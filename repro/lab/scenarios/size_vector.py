"""One rank dispatches by a list of sizes of an earlier step, because its own entry is the same as then.

Mirrors TensorRT-LLM issue 16745. Where all ranks bring as many rows, the dispatch is one all-gather, else one broadcast
per rank, and each rank decides which from its own list; only its own entry is ever checked. A rank with a stale list
waits in another operation than its peers on one communicator, or in the same one with other lengths. What comes of it
is the backend's choice: NCCL hangs; gloo hangs where the operations differ, ends a victim by SIGABRT where one rank is
sent more bytes than it has room for, and where it has too much room goes on with rubbish.

The cure: the sizes of a step are those that all agreed on in C1, on every rank and in every layer. The guard refuses
any others before they are issued, and the strict check sees them too.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrid_moe_ref.engine.policies import Policies
from hybrid_moe_ref.engine.scheduler import step_rows
from hybrid_moe_ref.parallel.dispatch import AllGatherReduceScatter
from repro.lab.scenarios import CLEAN, Expected, Scenario
from repro.lab.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor, nn


class GatherOrBroadcast(AllGatherReduceScatter):
    """The trigger: equal sizes travel in one all-gather, others in a broadcast per rank."""

    def dispatch(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        sizes = self.sizes(len(args[0]))
        return tuple(self.comm.all_gather_v("ep", args, sizes, layer=self.layer, broadcast_uneven=True))

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        """Rows of every rank: as agreed for this step."""
        return self.context.ep_sizes


@dataclass(frozen=True)
class KeepSizes(GatherOrBroadcast):
    """The fault: a list that was made once for this rank's number of rows serves whenever it has as many again."""

    known: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def sizes(self, num_rows: int) -> tuple[int, ...]:
        return self.known.setdefault(num_rows, self.context.ep_sizes)


def first_stale(settings: RunSettings) -> tuple[int, int] | None:
    """The first serve step in which a rank's list would be stale, and one such rank: the one that keeps its lists."""
    known: list[dict[int, list[int]]] = [{} for _ in range(settings.num_ranks)]
    for serve_step, rows in enumerate(step_rows(settings.requests(), settings.engine)):
        sizes = [num_rows or 1 for num_rows in rows]  # an idle rank has a dummy row
        stale = [rank for rank, lists in enumerate(known) if lists.setdefault(sizes[rank], sizes) != sizes]
        if stale:
            return serve_step, random.Random(settings.seed).choice(stale)
    return None


def policies(settings: RunSettings, rank: int) -> Policies:
    """control and fix: sizes as agreed; fault: one rank keeps those of an earlier step."""
    stale = settings.variant == "fault" and (found := first_stale(settings)) is not None and rank == found[1]
    return Policies(dispatch=KeepSizes if stale else GatherOrBroadcast)


def hang(settings: RunSettings) -> Expected:
    """The rank with the stale list is named by what all others say of each other's sizes."""
    found = first_stale(settings)
    if found is None:
        return CLEAN
    serve_step, rank = found
    # Step 0 is the profile run, so serve step i is step i + 1.
    hangs = Expected("deadlock", "sizes", (rank,), serve_step + 1, "layers.0.moe")
    if settings.backend != "gloo":
        return hangs
    # The victim need not be the culprit, and whoever is not a victim may come a collective further before it notices.
    corrupts = Expected("corrupt", "sizes", (rank,), serve_step + 1)
    return Expected("crash", "sizes", (rank,), serve_step + 1, or_else=dataclasses.replace(hangs, or_else=corrupts))


SCENARIO = Scenario(
    name="size_vector",
    summary="one rank dispatches by a stale list of sizes: another operation or length on one communicator",
    source="TensorRT-LLM#16745",
    policies=policies,
    hang=hang,
)
