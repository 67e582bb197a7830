"""From the tensors of a folder into the parameters of a model, one tensor at a time.

The model may hold only a part of itself: some experts of each layer, or the slices that `model.slices` tells of. Then
only that is read, except that columns of a matrix are cut from the whole of it.

Shapes: H hidden, I intermediate, M key heads of Gated DeltaNet, R value heads per key head.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.checkpoint.shards import Shards
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.slices import Slice, scaled

BLOCK = 128
VISION = ("model.visual.", "visual.", "vision_tower.")
MTP = "mtp."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A tensor that the checkpoint must have, with the shape it must have. `store` puts it, or its row `index`, or
    `part` of one of these, into the model; None means that another rank needs it."""

    name: str
    shape: tuple[int, ...]
    store: Callable[[Tensor], object] | None
    index: int | None = None
    part: Slice | None = None


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path | Shards, device: torch.device | str = "cpu") -> Shards:
    """Fill all parameters; those on meta come to `device`. The model is touched only when every tensor is there and
    fits. Returns the opened folder, which knows how many bytes were read."""
    shards = folder if isinstance(folder, Shards) else Shards(Path(folder))
    expected = pieces(model, shards)
    _check(expected, shards, model)
    if any(parameter.is_meta for parameter in model.parameters()):
        materialise = getattr(model, "materialise", model.to_empty)
        materialise(device=device)
    # The plan is made again: the parameters it writes to are new tensors.
    for piece in pieces(model, shards):
        if piece.store is not None:
            piece.store(_dequantised(shards, piece))
    return shards


def without_absent_mtp(config: ModelConfig, shards: Shards) -> ModelConfig:
    """The model without its draft layer when the folder has none: transformers drops it, but not its config key."""
    if config.num_mtp_layers and not any(name.startswith(MTP) for name in shards.names):
        log.warning(
            "%s: the config has %d MTP layers, no tensor is named %s*", shards.folder, config.num_mtp_layers, MTP
        )
        return dataclasses.replace(config, num_mtp_layers=0)
    return config


def pieces(model: nn.Module, shards: Shards) -> list[Piece]:
    """What `model` needs from these shards, in the layout that they have."""
    found: list[Piece] = []
    slices: dict[str, Slice] = getattr(model, "slices", {})
    multimodal = any(name.startswith("model.language_model.") for name in shards.names)
    for module_name, module in model.named_modules():
        name = module_name
        if multimodal and name.startswith("model."):
            name = "model.language_model." + name.removeprefix("model.")
        if isinstance(module, Experts):
            parts = {
                kind: slices.get(f"{module_name.split('.experts')[0]}.experts.{kind}", Slice(tuple(weight.shape))).row
                for kind, weight in module.named_parameters()
            }
            found += _expert_pieces(name.split(".experts")[0] + ".experts", module, parts, shards)
        elif isinstance(module, GatedDeltaNet) and f"{name}.in_proj_qkvz.weight" in shards:
            values = slices.get(f"{module_name}.in_proj_b.weight", Slice(tuple(module.in_proj_b.weight.shape)))
            found += _grouped_pieces(name, module, values)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}"
            part = slices.get(f"{module_name}.{parameter_name}", Slice(tuple(parameter.shape)))
            tied = full_name == "lm_head.weight" and parameter is model.get_parameter("model.embed_tokens.weight")
            grouped = any(f"{name.rpartition('.')[0]}.{x}.weight" in shards for x in _GROUPED.get(_last(name), ()))
            if not isinstance(module, Experts) and not tied and not grouped:
                found.append(Piece(full_name, part.full_shape, parameter.copy_, part=part))
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _expert_pieces(name: str, experts: Experts, parts: dict[str, Slice], shards: Shards) -> list[Piece]:
    """`parts` says which part of each expert's matrices the model holds."""
    first = experts.first_expert
    held = range(first, first + experts.num_local)
    found: list[Piece] = []
    if f"{name}.gate_up_proj" in shards:
        for kind, weight in experts.named_parameters():
            part, shape = parts[kind], (experts.num_experts, *parts[kind].full_shape)
            found += [Piece(f"{name}.{kind}", shape, weight[e - first].copy_, index=e, part=part) for e in held]
        return found
    gate_up, down = parts["gate_up_proj"], parts["down_proj"]
    # The two halves of gate_up are cut alike.
    half = Slice(
        (gate_up.full_shape[0] // 2, gate_up.full_shape[1]), tuple((dim, ranges[:1]) for dim, ranges in gate_up.cuts)
    )
    for e in range(experts.num_experts):
        targets: list[Callable | None] = [None] * 3
        if e in held:
            gate, up = experts.gate_up_proj[e - first].chunk(2)
            targets = [gate.copy_, up.copy_, experts.down_proj[e - first].copy_]
        for kind, part, store in zip(("gate_proj", "up_proj", "down_proj"), (half, half, down), targets, strict=True):
            found.append(Piece(f"{name}.{e}.{kind}.weight", part.full_shape, store, part=part))
    return found


_GROUPED = {
    "in_proj_qkv": ("in_proj_qkvz",),
    "in_proj_z": ("in_proj_qkvz",),
    "in_proj_a": ("in_proj_ba",),
    "in_proj_b": ("in_proj_ba",),
}


def _grouped_pieces(name: str, net: GatedDeltaNet, values: Slice) -> list[Piece]:
    """Qwen3-Next keeps the projections together by key head: [q | k | R v | R z] and [R b | R a] for each. `values`
    says which value heads the model holds; their key heads follow."""
    M, K, V = net.num_key_heads, net.key_dim, net.value_dim
    R = net.num_value_heads // M
    H = net.in_proj_z.weight.shape[1]

    def store_qkvz(x: Tensor) -> None:
        q, k, v, z = x.unflatten(0, (M, -1)).split([K, K, R * V, R * V], dim=1)
        parts = net.in_proj_qkv.weight.split([M * K, M * K, M * R * V])
        for part, source in zip([*parts, net.in_proj_z.weight], (q, k, v, z), strict=True):
            part.copy_(source.flatten(0, 1))

    def store_ba(x: Tensor) -> None:
        b, a = x.unflatten(0, (M, -1)).chunk(2, dim=1)
        net.in_proj_b.weight.copy_(b.flatten(0, 1))
        net.in_proj_a.weight.copy_(a.flatten(0, 1))

    first = values.cuts[0][1][0][0] // R if values.cuts else 0

    def piece(kind: str, rows_per_head: int, store: Callable[[Tensor], object]) -> Piece:
        shape = (values.full_shape[0] // R * rows_per_head, H)
        held = ((0, (scaled((first, first + M), rows_per_head),)),)
        return Piece(f"{name}.{kind}.weight", shape, store, part=Slice(shape, held))

    return [
        piece("in_proj_qkvz", 2 * (K + R * V), store_qkvz),
        piece("in_proj_ba", 2 * R, store_ba),
    ]


def _check(expected: list[Piece], shards: Shards, model: nn.Module) -> None:
    """One error that lists every tensor that is missing, misshapen or left over."""
    problems, known = [], set()
    for piece in {piece.name: piece for piece in expected}.values():
        known.add(piece.name)
        if piece.name not in shards:
            problems.append(f"{shards.folder}: {piece.name}: missing, wanted shape {list(piece.shape)}")
            continue
        entry = shards[piece.name]
        if entry.shape != piece.shape:
            problems.append(f"{entry.file}: {piece.name}: shape {list(entry.shape)}, wanted {list(piece.shape)}")
        elif entry.dtype == torch.float8_e4m3fn:
            scale, shape = f"{piece.name}_scale_inv", _num_blocks(piece.shape)
            known.add(scale)
            if scale not in shards:
                problems.append(f"{shards.folder}: {scale}: missing, wanted shape {list(shape)}")
            elif shards[scale].shape != shape:
                got = list(shards[scale].shape)
                problems.append(f"{shards[scale].file}: {scale}: shape {got}, wanted {list(shape)}")
    skipped = {name for name in shards.names - known if name.startswith(VISION)}
    if not hasattr(model, "mtp"):
        skipped |= {name for name in shards.names - known if name.startswith(MTP)}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        skipped |= {"lm_head.weight"} & shards.names
    for name in sorted(shards.names - known - skipped):
        problems.append(f"{shards[name].file}: {name}: not part of this model")
    if problems:
        raise CheckpointError(problems)
    for prefix in sorted({_family_name(name) for name in skipped}):
        count = sum(_family_name(name) == prefix for name in skipped)
        log.warning("%s: skipped %d tensors %s", shards.folder, count, prefix)


def _family_name(name: str) -> str:
    for prefix in (*VISION, MTP):
        if name.startswith(prefix):
            return prefix + "*"
    return name


def _num_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def _dequantised(shards: Shards, piece: Piece) -> Tensor:
    if shards[piece.name].dtype != torch.float8_e4m3fn:
        return shards.read(piece.name, piece.index, piece.part)
    weight = shards.read(piece.name, piece.index)
    scale = shards.read(f"{piece.name}_scale_inv", piece.index).float()
    rows, columns = weight.shape
    scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    weight = weight.float().mul_(scale)
    return weight if piece.part is None else piece.part.of(weight)
