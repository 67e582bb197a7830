"""Apply tensor parallelism to an unchanged model.

Every rank of a tp group runs the same tokens through its share of each layer's heads and intermediate features (see
`shares`). The output of the layer is the sum of what the ranks compute. So a layer issues these collectives. For the
MoE, they depend on how the ranks share the routed experts (`shares.ExpertSharing`):

    mixer                               all-reduce on tp
    MoE, "intermediate" or "expert"     all-reduce on tp
    MoE, "sequence"                     C2 and C3 on ep, then all-gather-v on tp

With "sequence", each tp rank sends only its chunk of the rows in C2, because all tp ranks have the same rows.

There is one all-reduce per mixer and step, whatever the batch is. If a Mamba-2 group or a Gated DeltaNet head spans
several ranks, its norm needs the mean square over all these ranks. The same all-reduce also computes this mean square,
see `SplitNorm`.

Every rank holds the whole embedding and head. So logits need no collective, and a rank with requests has the same
schedule as an idle rank. This costs 2 x vocab x hidden x (1 - 1/tp_size) parameters per rank. For the model of 397B
parameters in bfloat16 at tp_size 8, this is 3.6 GB of about 100 GB. Every rank also holds all norms and routers, and
the gate of the shared expert.

Shape suffixes: N tokens, H hidden, G groups of a norm, X = H + 1 (a row, and its mean square).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hybrid_moe_kernels.precision import wide, widen
from torch import Tensor, nn

from hybrid_moe_ref.config import LAYER_KINDS, ModelConfig
from hybrid_moe_ref.layers.moe import MLP, Experts, MoE
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import ScheduleEntry
from hybrid_moe_ref.parallel.sharding.dispatch import (
    AllGatherReduceScatter,
    ForwardContext,
    SumOverRanks,
    chunk_sizes,
    moe_layer_name,
)
from hybrid_moe_ref.parallel.sharding.shares import (
    ExpertSharing,
    Place,
    expert_cuts,
    experts_per_rank,
    local_config,
    mixer_cuts,
    mlp_cuts,
    rows,
)
from hybrid_moe_ref.slices import Cuts, Slice

MIXER_NAMES = {"G": "gated_delta_net", "A": "gated_attention", "M": "mamba2"}
"""The names of mixers in events and schedules, by layer kind."""


@dataclass
class SplitNorm:
    """The hooks of a mixer whose output norm has `num_groups` groups, each of which spans several ranks.

    In Mamba-2, which gates before the norm, a group of the norm is a group of heads. In Gated DeltaNet, which gates
    after the norm, a group of the norm is a value head.

    The norm should divide a row by the root mean square of the whole group, but a rank knows only the root mean square
    of its own part. The projection after the norm is linear, so the hooks can correct the result after the projection:

    1. Each rank multiplies its projected row by the root mean square of its part.
    2. One all-reduce sums these rows, and also the mean squares.
    3. Each rank divides the sum by the root mean square of the group.

    gates_first   whether the mixer gates before the norm
    eps           the epsilon of the norm
    mean_squares  the mean squares of this rank's part, one tensor for each run of the norm in this step
    """

    comm: Communicator
    layer: str
    num_groups: int
    gates_first: bool
    eps: float
    mean_squares: list[Tensor] = field(default_factory=list)

    def install(self, mixer: Any) -> tuple[ScheduleEntry, ...]:
        """Register the hooks, and return the collective that they issue in a forward pass."""
        mixer.register_forward_pre_hook(self.begin)
        mixer.norm.register_forward_hook(self.keep_mean_square)
        mixer.register_forward_hook(self.combine)
        return (ScheduleEntry("tp", "all_reduce", self.layer),)

    def begin(self, mixer: nn.Module, args: object) -> None:
        self.mean_squares.clear()

    def keep_mean_square(self, norm: nn.Module, args: tuple[Tensor, Tensor], y: object) -> None:
        """Append the mean square of the input of this rank's norm to `mean_squares`; `combine` corrects the norm by it.

        A forward hook of ``norm``. The norm runs once for each part of the step's batch, for example once for the
        decoding sequences.

        args: the input of the norm, and the gate
        """
        x, gate = (widen(z) for z in args)
        self.mean_squares.append((x * F.silu(gate) if self.gates_first else x).square().mean(-1))

    def combine(self, mixer: nn.Module, args: tuple[Any, ...], partial_NH: Tensor) -> Tensor:
        """Sum partial_NH, the mixer's output for N tokens on this rank, over the tp group, and correct the norm.

        A forward hook of ``mixer``. Every rank gets the result.

        args: the inputs of the mixer; the second one is the batch
        """
        (N, H), batch = partial_NH.shape, args[1]
        square_N = partial_NH.new_zeros(N, dtype=wide(partial_NH.dtype))
        for part, square in zip(batch.parts, self.mean_squares, strict=True):
            square_N[part.rows_T] = square.to(square_N.dtype).view_as(part.rows_T)
        tp_rank, tp_size = self.comm.group_rank("tp"), len(self.comm.members("tp"))
        sum_NGX = square_N.new_zeros(N, self.num_groups, H + 1)
        mine_NX = sum_NGX[:, tp_rank * self.num_groups // tp_size]
        mine_NX[:, :H] = partial_NH * (square_N + self.eps).sqrt()[:, None]
        mine_NX[:, H] = square_N * (self.num_groups / tp_size)
        self.comm.all_reduce("tp", sum_NGX, layer=self.layer)
        root_NG1 = torch.rsqrt(sum_NGX[:, :, H:] + self.eps)
        return (sum_NGX[:, :, :H] * root_NG1).sum(1).to(partial_NH.dtype)


@dataclass(frozen=True)
class SequenceChunks:
    """The hooks before and after an MoE, which let it run on only this rank's chunk of the rows.

    All ranks of a tp group have the same rows (one for each token). A chunk is the part that one of these ranks
    computes.

    context   has the numbers of tokens in the current step
    layer     the name of the MoE in events and schedules, such as "layers.0.moe"
    """

    comm: Communicator
    context: ForwardContext
    layer: str

    def install(self, moe: nn.Module) -> tuple[ScheduleEntry, ...]:
        """Register the hooks, and return the collective that they issue in a forward pass."""
        moe.register_forward_pre_hook(self.take)
        moe.register_forward_hook(self.gather)
        return (ScheduleEntry("tp", "all_gather_v", self.layer),)

    def take(self, moe: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Return this rank's chunk of the rows x_NH, the only item of ``args``. A forward pre-hook of ``moe``."""
        (x_NH,), agreed = args, self.context.sizes[self.comm.group_rank("dp")]
        if x_NH.shape[0] != agreed:
            raise ValueError(
                f"tp chunks at {self.layer}: this rank has {x_NH.shape[0]} rows, but the agreed size is {agreed}"
            )
        return (x_NH.split(self._sizes(agreed))[self.comm.group_rank("tp")],)

    def gather(self, moe: nn.Module, args: object, chunk: Tensor) -> Tensor:
        """Gather the outputs of all tp ranks: this rank's ``chunk`` -> all rows y_NH. A forward hook of ``moe``."""
        sizes = self._sizes(self.context.sizes[self.comm.group_rank("dp")])
        return self.comm.all_gather_v("tp", [chunk], sizes, layer=self.layer)[0]

    def _sizes(self, num_rows: int) -> tuple[int, ...]:
        return chunk_sizes(num_rows, self.context.tp_size)


def apply_tensor_parallel(
    model: HybridMoE,
    comm: Communicator,
    experts: ExpertSharing = "intermediate",
    backend: type[AllGatherReduceScatter] = AllGatherReduceScatter,
    adder: type[SumOverRanks] = SumOverRanks,
) -> ForwardContext:
    """In every layer, replace each module that is split over the tp ranks: keep only this rank's part of it.

    If the model is on the meta device, no rank ever holds the whole model. If the model has weights, this function cuts
    them. `model.config` becomes the configuration of the rank's part, so that a cache made from this configuration has
    only the rank's heads. `model.slices` gets the part of each parameter that the rank holds.

    experts  how the ranks share the routed experts. "intermediate": a rank has a part of each expert. "expert" and
             "sequence": a rank has some whole experts. Only with "sequence", the layers send tokens to the ranks of
             other tp groups; otherwise each tp group holds all experts.
    backend  the class of the hooks that exchange tokens (C2 and C3); used only with "sequence"
    adder    the class of the hook that sums the output of a module over the tp group

    Returns the context of the layers. With "sequence", set its `sizes` before each forward pass: a tuple of the number
    of tokens of each dp rank in this step.

    Raises ConfigError for a size that cannot be divided over the ranks.
    """
    whole = model.config
    place = Place(comm.group_rank("tp"), len(comm.members("tp")))
    model.config = local_config(whole, place.size, experts)
    context = ForwardContext(tp_size=place.size)
    sharding = _Sharding(model, whole, place, comm, experts, backend, adder, context)
    context.schedule = sharding.share((f"model.layers.{index}", block) for index, block in enumerate(model.blocks))
    context.draft_schedule = sharding.share((block.name, block) for block in model.draft_blocks)
    return context


@dataclass(frozen=True)
class _Sharding:
    """Replaces modules of the model by one rank's parts.

    Each method `share…` returns the collectives that a forward pass through the replaced modules issues, in order.

    whole    the configuration of the unsharded model
    place    the position of this rank in its tp group
    experts  how the ranks share the routed experts
    backend  the class of the hooks that exchange tokens before and after the experts (C2 and C3)
    adder    the class of the hook that sums the output of a module over the tp group
    context  what the layers know about the other ranks in a step, such as their numbers of tokens
    """

    model: HybridMoE
    whole: ModelConfig
    place: Place
    comm: Communicator
    experts: ExpertSharing
    backend: type[AllGatherReduceScatter]
    adder: type[SumOverRanks]
    context: ForwardContext

    def share(self, blocks: Iterable[tuple[str, Any]]) -> tuple[ScheduleEntry, ...]:
        """Replace the modules of these layers by this rank's parts.

        blocks: for each layer, its path in the model and the layer itself

        Returns the collectives that a forward pass through these layers then issues, in order.
        """
        schedule: list[ScheduleEntry] = []
        for path, block in blocks:
            share_mlp = self.share_moe if isinstance(block.mlp, MoE) else self.share_dense
            schedule += [*self.share_mixer(path, block), *share_mlp(path, block)]
        return tuple(schedule)

    def share_mixer(self, path: str, block: Any) -> tuple[ScheduleEntry, ...]:
        layer = f"{block.name}.{MIXER_NAMES[block.kind]}"
        with torch.device("meta"):
            part = type(block.mixer)(self.model.config)
        self._replace(f"{path}.{LAYER_KINDS[block.kind]}", part, mixer_cuts(self.whole, block.kind, self.place))
        num_groups = {"G": self.whole.linear_num_value_heads, "M": self.whole.mamba_num_groups}.get(block.kind)
        if num_groups is not None and num_groups < self.place.size:
            return SplitNorm(self.comm, layer, num_groups, block.kind == "M", part.norm.eps).install(part)
        return self.adder(self.comm, layer).install(part)

    def share_dense(self, path: str, block: Any) -> tuple[ScheduleEntry, ...]:
        self._share_mlp(f"{path}.mlp", self.whole.intermediate_size)
        return self.adder(self.comm, f"{block.name}.mlp").install(block.mlp)

    def share_moe(self, path: str, block: Any) -> tuple[ScheduleEntry, ...]:
        moe, layer = block.mlp, moe_layer_name(block.name)
        self._replace(f"{path}.mlp.experts", *self._experts())
        if self.experts != "sequence":
            self._share_mlp(f"{path}.mlp.shared_expert", self.whole.shared_expert_intermediate_size)
            return self.adder(self.comm, layer).install(moe)
        exchange = self.backend(self.comm, self.context, layer)
        chunks = SequenceChunks(self.comm, self.context, layer)
        return (*exchange.install(moe.experts), *chunks.install(moe))

    def _share_mlp(self, path: str, intermediate_size: int) -> None:
        with torch.device("meta"):
            part = MLP(self.whole.hidden_size, intermediate_size // self.place.size)
        self._replace(path, part, mlp_cuts(intermediate_size, self.place))

    def _experts(self) -> tuple[Experts, dict[str, Cuts]]:
        """Return a module for this rank's part of a layer's experts, and which part of each parameter it holds."""
        number, hidden, width = self.whole.num_experts, self.whole.hidden_size, self.whole.moe_intermediate_size
        with torch.device("meta"):
            if self.experts == "intermediate":
                return Experts(number, hidden, width // self.place.size), expert_cuts(width, self.place)
            group = "ep" if self.experts == "sequence" else "tp"
            count = experts_per_rank(number, len(self.comm.members(group)))
            first = self.comm.group_rank(group) * count
            part = Experts(number, hidden, width, first_expert=first, num_local=count)
        return part, {name: rows((first, first + count)) for name, _ in part.named_parameters()}

    def _replace(self, path: str, part: nn.Module, cuts: Mapping[str, Cuts]) -> None:
        """Replace the module at `path` by `part`, and give `part` this rank's share of the old module's parameters.

        cuts: for the name of each parameter that is split, which part of it the rank holds
        """
        whole = self.model.get_submodule(path)
        for name, local in list(part.named_parameters()):
            full = whole.get_parameter(name)
            piece = Slice(tuple(full.shape), cuts.get(name, ()))
            assert piece.shape == tuple(local.shape), f"{path}.{name}: {piece.shape} of {piece.full_shape}"
            owner, _, leaf = name.rpartition(".")
            held = full.detach()
            if full.is_meta:
                # This is a new tensor, not a view or copy: the first of these on the meta device imports the compiler
                # (1.3 s).
                held = torch.empty(piece.shape, dtype=full.dtype, device="meta")
            elif piece.cuts:
                held = piece.of(held).clone()
            part.get_submodule(owner).register_parameter(leaf, nn.Parameter(held, requires_grad=full.requires_grad))
            if piece.cuts:
                self.model.slices[f"{path}.{name}"] = piece
        self.model.set_submodule(path, part)
