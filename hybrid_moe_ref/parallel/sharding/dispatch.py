"""The EP backend of a layer: send tokens to the ranks that hold their experts, and bring the results back.

A backend is two hooks around the experts of one layer, and a list of the collectives that these hooks issue. `install`
registers the hooks and returns this list; the lists of all layers are the schedule of a forward pass.

The engine uses `AllGatherReduceScatter`. Another backend is a subclass of this class, or has the same methods; an
example is in `repro.lab.scenarios.size_vector`. ``Policies.dispatch`` selects the backend; a server has no setting for
it. This file does not import torch.

Shape suffixes: N tokens of this rank, S tokens of all ranks, H hidden, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hybrid_moe_ref.parallel.observer import ScheduleEntry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hybrid_moe_ref.parallel.comm import Communicator


@dataclass
class ForwardContext:
    """What the layers know about the other ranks in the current step. The engine sets `sizes` before the model runs.

    sizes           agreed number of tokens of each dp rank in this step
    tp_size         number of ranks that run the same tokens. Each of these ranks dispatches only its part of these
                    tokens (see `chunk_sizes`)
    schedule        the collectives that one forward pass issues, in order
    draft_schedule  the collectives of one pass of the draft layer
    """

    sizes: tuple[int, ...] = ()
    tp_size: int = 1
    schedule: tuple[ScheduleEntry, ...] = ()
    draft_schedule: tuple[ScheduleEntry, ...] = ()
    _chunked: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def ep_sizes(self) -> tuple[int, ...]:
        """Return the number of tokens that each ep rank dispatches.

        The result is cached, because every layer needs it twice in a step.
        """
        if self._chunked[0] is not self.sizes:
            self._chunked = self.sizes, _chunks_of_all(self.sizes, self.tp_size)
        return self._chunked[1]


def chunk_sizes(num_rows: int, num_chunks: int) -> tuple[int, ...]:
    """Split rows into chunks: return the number of rows of each. Chunks differ by at most one row, and can be empty."""
    each, more = divmod(num_rows, num_chunks)
    return tuple(each + (index < more) for index in range(num_chunks))


def _chunks_of_all(sizes: tuple[int, ...], tp_size: int) -> tuple[int, ...]:
    if tp_size == 1:
        return sizes
    return tuple(chunk for size in sizes for chunk in chunk_sizes(size, tp_size))


@dataclass(frozen=True)
class AllGatherReduceScatter:
    """The hooks before (dispatch) and after (combine) the experts of a layer, like vLLM's AgRsAll2AllManager.

    With hooks, the modules of the experts and the names of their parameters stay as in the single-process model.

    context   has the numbers of tokens in the current step
    layer     the name of the layer's MoE in events and schedules, such as "layers.0.moe"
    """

    comm: Communicator
    context: ForwardContext
    layer: str

    @classmethod
    def plan(cls, layer: str) -> tuple[ScheduleEntry, ...]:
        """Return the collectives that one layer, such as "layers.0.moe", issues in a forward pass, in order."""
        return ScheduleEntry("ep", "all_gather_v", layer), ScheduleEntry("ep", "reduce_scatter_v", layer)

    def install(self, experts: nn.Module) -> tuple[ScheduleEntry, ...]:
        """Register the hooks on a layer's experts. Returns the collectives that the hooks issue in a forward pass."""
        experts.register_forward_pre_hook(self.dispatch)
        experts.register_forward_hook(self.combine)
        return self.plan(self.layer)

    def dispatch(self, experts: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Gather the tokens of all ranks before the experts run. This is a forward pre-hook of ``experts``.

        args: (x_NH, weights_NK, ids_NK) of this rank's N tokens: their rows of hidden size H, and the weights and ids
        of the K experts that the router chose for each token

        Returns (x_SH, weights_SK, ids_SK): the same of the S tokens of all ranks.
        """
        return tuple(self.comm.all_gather_v("ep", args, self.context.ep_sizes, layer=self.layer))

    def combine(self, experts: nn.Module, args: object, partial_SH: Tensor) -> Tensor:
        """Sum the contributions of all ranks, and keep this rank's tokens. This is a forward hook of ``experts``.

        partial_SH: what this rank's experts contribute to each of the S tokens of all ranks, [S, hidden size]

        Returns y_NH: the sum for each of this rank's N tokens.
        """
        return self.comm.reduce_scatter_v("ep", partial_SH, self.context.ep_sizes, layer=self.layer)


@dataclass(frozen=True)
class SumOverRanks:
    """A forward hook that sums a module's output over the tp group, because each rank's output is one summand."""

    comm: Communicator
    layer: str

    def install(self, module: nn.Module) -> tuple[ScheduleEntry, ...]:
        """Register the hook on ``module``, and return the collective that it issues in a forward pass."""
        module.register_forward_hook(self.combine)
        return (ScheduleEntry("tp", "all_reduce", self.layer),)

    def combine(self, module: nn.Module, args: object, partial_NH: Tensor) -> Tensor:
        """Sum partial_NH, the module's output for N tokens on this rank, over the tp group. Every rank gets the sum."""
        return self.comm.all_reduce("tp", partial_NH.contiguous(), layer=self.layer)


def moe_layer_name(block: str) -> str:
    """Return the name of a layer's MoE in events and schedules: "layers.0.moe" for the block "layers.0"."""
    return f"{block}.moe"
