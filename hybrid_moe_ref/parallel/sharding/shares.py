"""Compute one tensor-parallel rank's part of the model: its sizes, and its part of each parameter.

Heads are distributed in order, each head with everything that belongs to it:

    gated attention  query heads, with the KV heads that they read
    Gated DeltaNet   value heads, with the key heads that they read and the convolution channels of both. If there are
                     fewer value heads than ranks, a rank has some columns of the state of one head. This is possible
                     because the columns do not depend on each other.
    Mamba-2          heads, with the groups that they read
    MLP              intermediate features of the shared expert, of a dense MLP, and of routed experts that are not
                     distributed whole

If there are fewer KV heads, Gated DeltaNet key heads or Mamba-2 groups than ranks, several ranks hold the same head or
group. This file only computes with the sizes of a configuration, and does not import torch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from hybrid_moe_ref.config import ConfigError, ModelConfig, ParallelConfig
from hybrid_moe_ref.slices import Cuts, Range, scaled, sections

ExpertSharing = Literal["intermediate", "expert", "sequence"]
"""How the ranks share the routed experts.

intermediate  every tp rank has a part of every expert, for all tokens of its dp rank
expert        every tp rank has some whole experts, for all tokens of its dp rank
sequence      every ep rank has some whole experts, and every tp rank sends its chunk of the tokens to these experts;
              every rank has the whole shared expert, and applies it to its chunk
"""


def expert_sharing(parallel: ParallelConfig) -> ExpertSharing:
    """Return how the ranks of a layout with tp_size > 1 share the routed experts.

    "intermediate"   every tp rank has a part of every expert
    "expert"         every tp rank has some whole experts
    "sequence"       every ep rank has some whole experts, and receives tokens of other tp groups
    """
    if not parallel.expert_parallel:
        return "intermediate"
    return "expert" if parallel.dp_size == 1 else "sequence"


def experts_per_rank(num_experts: int, num_ranks: int) -> int:
    """Return the number of whole experts of each rank. Raises ConfigError if the ranks would have different numbers."""
    if num_experts % num_ranks:
        raise ConfigError(f"{num_experts} experts cannot be divided evenly over {num_ranks} ranks", "num_experts")
    return num_experts // num_ranks


@dataclass(frozen=True)
class Place:
    """The position of one rank in its tp group: the group rank, and the number of ranks."""

    rank: int
    size: int

    def share(self, count: int) -> Range:
        """Return this rank's range of `count` items, such as heads.

        If there are fewer items than ranks, several ranks hold the same item, and the range has this one item.
        """
        each = max(1, count // self.size)
        first = self.rank * count // self.size
        return first, first + each


def local_config(config: ModelConfig, tp_size: int, experts: ExpertSharing = "intermediate") -> ModelConfig:
    """Return the configuration with the sizes of one rank's part of the model and of the cache.

    experts: how the ranks share the routed experts, as `expert_sharing` returns it

    Raises ConfigError for a size that cannot be divided over the ranks.
    """
    local: dict[str, Any] = {}

    def divide(*names: str) -> None:
        for name in names:
            count: int = getattr(config, name)
            if count % tp_size:
                raise ConfigError(f"{count} is not divisible by tp_size {tp_size}", name)
            local[name] = count // tp_size

    def divide_or_share(name: str) -> None:
        count: int = getattr(config, name)
        if count % tp_size and tp_size % count:
            raise ConfigError(f"{count} is neither divisible by tp_size {tp_size} nor a divisor of it", name)
        local[name] = max(1, count // tp_size)

    if "A" in config.layer_pattern or config.num_mtp_layers:
        divide("num_attention_heads")
        divide_or_share("num_key_value_heads")
    if "G" in config.layer_pattern:
        divide_or_share("linear_num_key_heads")
        divide_or_share("linear_num_value_heads")
        ranks_per_head = max(1, tp_size // config.linear_num_value_heads)
        if config.linear_value_head_dim % ranks_per_head:
            raise ConfigError(
                f"{config.linear_value_head_dim} is not divisible by {ranks_per_head}, the number of ranks that share "
                f"a value head (tp_size {tp_size})",
                "linear_value_head_dim",
            )
        local["linear_value_head_dim"] = config.linear_value_head_dim // ranks_per_head
    if "M" in config.layer_pattern:
        divide("mamba_num_heads")
        divide_or_share("mamba_num_groups")
    if not config.num_experts:
        divide("intermediate_size")
    elif experts != "sequence":
        divide("shared_expert_intermediate_size")
        if experts == "intermediate":
            divide("moe_intermediate_size")
    return dataclasses.replace(config, **local)


def mixer_cuts(config: ModelConfig, kind: str, place: Place) -> dict[str, Cuts]:
    """Return, for the name of each split parameter of a mixer, the part that the rank at `place` holds.

    The part is a tuple of (dimension, the index ranges that the rank holds), one for each dimension that is cut.

    kind: "A" (gated attention), "G" (Gated DeltaNet) or "M" (Mamba-2)
    """
    return {"A": _attention_cuts, "G": _delta_net_cuts, "M": _mamba_cuts}[kind](config, place)


def mlp_cuts(intermediate_size: int, place: Place) -> dict[str, Cuts]:
    """Return, for each parameter name of a dense MLP or shared expert, the part that the rank at `place` holds.

    The part is a tuple of (dimension, the index ranges that the rank holds), one for each dimension that is cut.

    intermediate_size: that of the whole module, before it is cut
    """
    held = place.share(intermediate_size)
    return {
        "gate_proj.weight": rows(held),
        "up_proj.weight": rows(held),
        "down_proj.weight": columns(held),
    }


def expert_cuts(intermediate_size: int, place: Place) -> dict[str, Cuts]:
    """Return, for each parameter name of the routed experts, the part that the rank at `place` holds.

    A parameter has the weights of all experts, stacked. Each expert is split along its intermediate dimension. The part
    is a tuple of (dimension, the index ranges that the rank holds), one for each dimension that is cut.

    intermediate_size: that of a whole expert, before it is cut
    """
    held = place.share(intermediate_size)
    return {
        "gate_up_proj": ((1, sections([(intermediate_size, held)] * 2)),),
        "down_proj": ((2, (held,)),),
    }


def rows(*held: Range) -> Cuts:
    """Return what to keep of a projection's weight: the ranges `held` of its outputs, which are rows of the weight."""
    return ((0, held),)


def columns(*held: Range) -> Cuts:
    """Return what to keep of a projection's weight: the ranges `held` of its inputs, which are columns of the weight.

    The outputs of all ranks must then be summed.
    """
    return ((1, held),)


def _attention_cuts(config: ModelConfig, place: Place) -> dict[str, Cuts]:
    heads, dim = place.share(config.num_attention_heads), config.head_dim
    kv = rows(scaled(place.share(config.num_key_value_heads), dim))
    return {
        "q_proj.weight": rows(scaled(heads, 2 * dim)),
        "k_proj.weight": kv,
        "v_proj.weight": kv,
        "o_proj.weight": columns(scaled(heads, dim)),
    }


def _delta_net_cuts(config: ModelConfig, place: Place) -> dict[str, Cuts]:
    keys, key_dim = config.linear_num_key_heads, config.linear_key_head_dim
    values, value_dim = config.linear_num_value_heads, config.linear_value_head_dim
    value_heads = place.share(values)
    k, v = scaled(place.share(keys), key_dim), place.share(values * value_dim)
    within = v[0] % value_dim, v[0] % value_dim + value_dim * values // place.size
    qkv = rows(*sections([(keys * key_dim, k), (keys * key_dim, k), (values * value_dim, v)]))
    return {
        "in_proj_qkv.weight": qkv,
        "in_proj_z.weight": rows(v),
        "in_proj_b.weight": rows(value_heads),
        "in_proj_a.weight": rows(value_heads),
        "conv1d.weight": qkv,
        "A_log": rows(value_heads),
        "dt_bias": rows(value_heads),
        **({"norm.weight": rows(within)} if values < place.size else {}),
        "out_proj.weight": columns(v),
    }


def _mamba_cuts(config: ModelConfig, place: Place) -> dict[str, Cuts]:
    heads = place.share(config.mamba_num_heads)
    inner, shared = config.mamba_num_heads * config.mamba_head_dim, config.mamba_num_groups * config.mamba_state_size
    x = scaled(heads, config.mamba_head_dim)
    bc = scaled(place.share(config.mamba_num_groups), config.mamba_state_size)
    xbc = [(inner, x), (shared, bc), (shared, bc)]
    return {
        "in_proj.weight": rows(*sections([(inner, x), *xbc, (config.mamba_num_heads, heads)])),
        "conv1d.weight": rows(*sections(xbc)),
        "conv1d.bias": rows(*sections(xbc)),
        "A_log": rows(heads),
        "D": rows(heads),
        "dt_bias": rows(heads),
        "norm.weight": rows(x),
        "out_proj.weight": columns(x),
    }
