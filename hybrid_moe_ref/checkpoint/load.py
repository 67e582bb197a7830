"""Copy the tensors of a folder into the parameters of a model, a few rows at a time.

A model can hold only a part of its parameters: some experts of each layer, or the slices in `model.slices`. Then only
the rows that the model holds are read. A row is always read as a whole, even if the model holds only some columns of
it: the operating system reads whole memory pages, and these columns mostly take less than one page.

Shapes: H hidden, I intermediate, M key heads of Gated DeltaNet, K key dim, V value dim, R value heads per key head.
"""

import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.checkpoint.families import family_in
from hybrid_moe_ref.checkpoint.shards import FLOAT8, SCALES, WEIGHTS, Shards
from hybrid_moe_ref.config import ModelConfig
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.slices import Range, Slice

BLOCK = 128
VISION = ("model.visual.", "visual.", "vision_tower.")
MTP = "mtp."
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A tensor that the checkpoint must have, the parameter that it fills, and which part of the tensor to copy.

    name     the name of the tensor in the checkpoint
    shape    the shape that the tensor must have
    target   the parameter to fill; None: this rank does not need the tensor, only other ranks do
    index    copy only `tensor[index]`, such as one expert of a layer; None: the whole tensor
    part     the part of `tensor[index]` (or of the whole tensor) to copy; None: all of it
    """

    name: str
    shape: tuple[int, ...]
    target: Tensor | None
    index: int | None = None
    part: Slice | None = None


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path | Shards, device: torch.device | str = "cpu") -> Shards:
    """Fill all parameters from a folder. All tensors are checked first; if one is wrong, the model stays unchanged.

    device: the device for parameters that are on the meta device

    Returns the `Shards` of the folder, with the number of bytes that were read (`bytes_read`). Raises CheckpointError,
    which lists every tensor that is missing, cannot be used or belongs to no part of the model.
    """
    shards = folder if isinstance(folder, Shards) else Shards(Path(folder))
    expected = pieces(model, shards)
    _check(expected, shards, model)
    if any(parameter.is_meta for parameter in model.parameters()):
        materialise = getattr(model, "materialise", model.to_empty)
        materialise(device=device)
    # List the pieces again, because the parameters are new tensors now.
    for piece in pieces(model, shards):
        if piece.target is not None:
            _fill(piece.target, piece, shards)
    return shards


def with_mtp_of(config: ModelConfig, shards: Shards) -> ModelConfig:
    """Return `config` with the number of MTP layers for which the folder has tensors: 0 or 1.

    The number in config.json cannot be trusted. Qwen3-Next has no key for this number. Qwen3.5 has such a key, but
    when transformers saves a model, transformers keeps the key and drops the tensors.

    If the config has an MTP layer, but the folder has no tensors for it, log a warning and return 0 MTP layers. If the
    folder has such tensors, raises CheckpointError in two cases: they are for more than one MTP layer, or the config
    has MTP layers, but a different number of them.
    """
    names = [name for name in shards.names if name.startswith(MTP)]
    if not names:
        if config.num_mtp_layers:
            _warn_without_mtp(shards.folder, config.num_mtp_layers)
        return dataclasses.replace(config, num_mtp_layers=0)
    numbers = [int(number) for name in names if (number := name.removeprefix(f"{MTP}layers.").split(".")[0]).isdigit()]
    count = 1 + max(numbers, default=0)
    if config.num_mtp_layers not in (0, count):
        problem = f"the config has {config.num_mtp_layers} MTP layers, but there are tensors {MTP}* for {count}"
        raise CheckpointError(f"{shards.folder}: {problem}")
    if count > 1:
        raise CheckpointError(
            f"{shards.folder}: the tensors {MTP}* are for {count} MTP layers, but only 1 is implemented"
        )
    return dataclasses.replace(config, num_mtp_layers=count)


@functools.cache
def _warn_without_mtp(folder: Path, num_layers: int) -> None:
    """Log that a model is loaded without its MTP layers, once per folder, even if it is loaded several times."""
    log.warning(
        "%s: the config has %d MTP layers, but no tensor is named %s*: the model is loaded without them",
        folder,
        num_layers,
        MTP,
    )


def pieces(model: nn.Module, shards: Shards) -> list[Piece]:
    """List the tensors that `model` needs from a checkpoint, with the parameter that each of them fills on this rank.

    Names and shapes depend on the checkpoint's format.
    """
    needed: list[Piece] = []
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
            needed += _expert_pieces(name.split(".experts")[0] + ".experts", module, parts, shards)
        elif isinstance(module, GatedDeltaNet) and f"{name}.in_proj_qkvz.weight" in shards:
            projections = {kind: module.get_parameter(f"{kind}.weight") for kind in _GROUPED}
            held = {
                kind: slices.get(f"{module_name}.{kind}.weight", Slice(tuple(weight.shape)))
                for kind, weight in projections.items()
            }
            needed += _grouped_pieces(name, module, held)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{parameter_name}"
            part = slices.get(f"{module_name}.{parameter_name}", Slice(tuple(parameter.shape)))
            tied = full_name == "lm_head.weight" and parameter is model.get_parameter("model.embed_tokens.weight")
            grouped = any(f"{name.rpartition('.')[0]}.{x}.weight" in shards for x in _GROUPED.get(_last(name), ()))
            if not isinstance(module, Experts) and not tied and not grouped:
                needed.append(Piece(full_name, part.full_shape, parameter, part=part))
    return needed


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _expert_pieces(name: str, experts: Experts, parts: dict[str, Slice], shards: Shards) -> list[Piece]:
    """List the checkpoint's tensors for the experts of one layer, with the parameter that each fills on this rank.

    name    the name of the experts in the checkpoint, such as "model.layers.0.mlp.experts"
    parts   for "gate_up_proj" and "down_proj", the matrices of an expert: the part that the model holds
    """
    first = experts.first_expert
    held = range(first, first + experts.num_local)
    needed: list[Piece] = []
    if f"{name}.gate_up_proj" in shards:
        for kind, weight in experts.named_parameters():
            part, shape = parts[kind], (experts.num_experts, *parts[kind].full_shape)
            needed += [Piece(f"{name}.{kind}", shape, weight[e - first], index=e, part=part) for e in held]
        return needed
    gate_up, down = parts["gate_up_proj"], parts["down_proj"]
    # The gate and up halves are sliced in the same way.
    half = Slice(
        (gate_up.full_shape[0] // 2, gate_up.full_shape[1]), tuple((dim, ranges[:1]) for dim, ranges in gate_up.cuts)
    )
    for e in range(experts.num_experts):
        targets: list[Tensor | None] = [None] * 3
        if e in held:
            gate, up = experts.gate_up_proj[e - first].chunk(2)
            targets = [gate, up, experts.down_proj[e - first]]
        for kind, part, target in zip(("gate_proj", "up_proj", "down_proj"), (half, half, down), targets, strict=True):
            needed.append(Piece(f"{name}.{e}.{kind}.weight", part.full_shape, target, part=part))
    return needed


_GROUPED = {
    "in_proj_qkv": ("in_proj_qkvz",),
    "in_proj_z": ("in_proj_qkvz",),
    "in_proj_a": ("in_proj_ba",),
    "in_proj_b": ("in_proj_ba",),
}


def _grouped_pieces(name: str, net: GatedDeltaNet, slices: dict[str, Slice]) -> list[Piece]:
    """List the checkpoint's tensors for a GDN layer's projections, for a checkpoint of Qwen3-Next.

    Qwen3-Next stores these projections in two tensors, each with one block of rows for each key head. A block has the
    rows [q | k | v | z] or [b | a] of this key head and its value heads.

    name     the name of the layer in the checkpoint
    slices   for each projection, the rows that this rank holds
    """
    K = net.key_dim
    values, per_head = slices["in_proj_z"].full_shape[0], slices["in_proj_b"].full_shape[0]
    M = (slices["in_proj_qkv"].full_shape[0] - values) // (2 * K)  # key heads of the whole model
    RV, R, H = values // M, per_head // M, net.in_proj_z.weight.shape[1]
    whole = ((0, M * K), (M * K, 2 * M * K), (2 * M * K, 2 * M * K + values))
    q, k, v = slices["in_proj_qkv"].cuts[0][1] if slices["in_proj_qkv"].cuts else whole
    (z,) = slices["in_proj_z"].cuts[0][1] if slices["in_proj_z"].cuts else ((0, values),)
    (heads,) = slices["in_proj_b"].cuts[0][1] if slices["in_proj_b"].cuts else ((0, per_head),)
    k, v = (k[0] - M * K, k[1] - M * K), (v[0] - 2 * M * K, v[1] - 2 * M * K)

    def piece(kind: str, linear: nn.Linear, *parts: tuple[Range, int, int]) -> Piece:
        """Return which rows of a stored tensor fill the weight of the projection `linear`.

        kind   the name of the stored tensor: "in_proj_qkvz" or "in_proj_ba"
        parts  the arguments (held, size, offset) of `_in_blocks` for each of q, k, v, z, b and a that the weight has
        """
        block = 2 * (K + RV) if kind == "in_proj_qkvz" else 2 * R
        held = tuple(rows for part in parts for rows in _in_blocks(*part, block))
        part = Slice((M * block, H), ((0, held),))
        return Piece(f"{name}.{kind}.weight", part.full_shape, linear.weight, part=part)

    return [
        piece("in_proj_qkvz", net.in_proj_qkv, (q, K, 0), (k, K, K), (v, RV, 2 * K)),
        piece("in_proj_qkvz", net.in_proj_z, (z, RV, 2 * K + RV)),
        piece("in_proj_ba", net.in_proj_b, (heads, R, 0)),
        piece("in_proj_ba", net.in_proj_a, (heads, R, R)),
    ]


def _in_blocks(held: Range, size: int, offset: int, block: int) -> Iterator[Range]:
    """Convert a range of rows of q (or of k, v, z, b, a) to ranges of rows of the checkpoint's tensor.

    The tensor consists of equal blocks, and each block has some rows of q.

    held    the range of rows of q
    size    number of rows of q in each block
    offset  where these rows begin in the block
    block   number of rows of a block
    """
    start, stop = held
    while start < stop:
        index, inside = divmod(start, size)
        count = min(size - inside, stop - start)
        first = index * block + offset + inside
        yield first, first + count
        start += count


def _check(expected: list[Piece], shards: Shards, model: nn.Module) -> None:
    """Raise a CheckpointError with a line for each tensor that is missing, cannot be used or has no place in the model.

    If there is no such tensor, log how many tensors the loader skips.
    """
    problems, expected_names, absent_mtp = [], set(), []
    for piece in {piece.name: piece for piece in expected}.values():
        expected_names.add(piece.name)
        if piece.name not in shards and piece.name.startswith(MTP):
            absent_mtp.append(piece.name)
        elif piece.name not in shards:
            problems.append(f"{shards.folder}: {piece.name}: missing, wanted shape {list(piece.shape)}")
        else:
            problems += _misfits(piece, shards)
            if shards[piece.name].dtype == FLOAT8:
                expected_names.add(f"{piece.name}_scale_inv")
    if absent_mtp:
        there = sum(name.startswith(MTP) for name in shards.names)
        problem = f"the MTP layer is incomplete: {there} tensors, without {absent_mtp[0]}"
        more = f" and {len(absent_mtp) - 1} others" if len(absent_mtp) > 1 else ""
        problems.append(
            f"{shards.folder}: {problem}{more}; remove all tensors {MTP}* to load the model without this layer"
        )
    skipped = _skipped(shards.names - expected_names, model)
    # The names of the experts depend on which tensors exist: if some are missing, the others may look unused.
    foreign = {name for name in shards.names - expected_names - skipped if not (absent_mtp and name.startswith(MTP))}
    for name in sorted(foreign):
        problems.append(f"{shards[name].file}: {name}: no part of this model uses this tensor")
    if problems:
        raise CheckpointError(problems)
    for prefix, count in _families(skipped).items():
        log.warning("%s: skipped %d tensors %s", shards.folder, count, prefix)


def _misfits(piece: Piece, shards: Shards) -> Iterator[str]:
    """Yield the reason in one line if the shape or dtype of a tensor, or of its float8 scales, cannot be used."""
    entry, name = shards[piece.name], f"{piece.name}_scale_inv"
    where = f"{entry.file}: {piece.name}"
    if entry.shape != piece.shape:
        yield f"{where}: shape {list(entry.shape)}, wanted {list(piece.shape)}"
    elif entry.dtype not in WEIGHTS:
        yield f"{where}: dtype {entry.dtype} is not one of {', '.join(WEIGHTS)}"
    elif entry.dtype == FLOAT8 and len(entry.shape) < 2:
        yield f"{where}: a float8 tensor needs 2 dimensions for its blocks, but has shape {list(entry.shape)}"
    elif entry.dtype == FLOAT8 and name not in shards:
        yield f"{shards.folder}: {name}: missing, wanted shape {list(_num_blocks(piece.shape))}"
    elif entry.dtype == FLOAT8 and (scale := shards[name]).shape != _num_blocks(piece.shape):
        yield f"{scale.file}: {name}: shape {list(scale.shape)}, wanted {list(_num_blocks(piece.shape))}"
    elif entry.dtype == FLOAT8 and scale.dtype not in SCALES:
        yield f"{scale.file}: {name}: scales of dtype {scale.dtype} are not implemented, only {', '.join(SCALES)}"


def describe(folder: str | Path, model: nn.Module) -> dict[str, Any]:
    """Return what the command `check` prints about a checkpoint.

    The keys of the dict are family, files, tensors (how many), quantisation, and skipped (tensors that are not loaded).

    model: a model that was loaded from this folder
    """
    shards = Shards(Path(folder))
    needed = {piece.name for piece in pieces(model, shards)}
    quantised = [name for name in needed if shards[name].dtype == FLOAT8]
    unused = shards.names - needed - {f"{name}_scale_inv" for name in quantised}
    return {
        "family": family_in(folder),
        "files": sorted({shards[name].file.name for name in shards.names}),
        "tensors": len(shards.names),
        "quantisation": f"{len(quantised)} tensors in float8 blocks of {BLOCK} x {BLOCK}" if quantised else "none",
        "skipped": _families(_skipped(unused, model)),
    }


def _skipped(unused: set[str], model: nn.Module) -> set[str]:
    """Return the `unused` tensor names that the loader can skip without an error.

    These are tensors of a vision model, tensors of an MTP layer if `model` has no MTP layer, and the head if it is tied
    to the embedding.
    """
    skipped = {name for name in unused if name.startswith(VISION)}
    if not hasattr(model, "mtp"):
        skipped |= {name for name in unused if name.startswith(MTP)}
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        skipped |= {"lm_head.weight"} & unused
    return skipped


def _families(names: set[str]) -> dict[str, int]:
    return dict(sorted(Counter(map(_family_name, names)).items()))


def _family_name(name: str) -> str:
    for prefix in (*VISION, MTP):
        if name.startswith(prefix):
            return prefix + "*"
    return name


def _num_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def _fill(target: Tensor, piece: Piece, shards: Shards) -> None:
    """Fill one parameter from the tensor that `piece` describes.

    Only a few rows of this tensor are in memory at a time, in addition to the model.
    """
    cuts = dict(piece.part.cuts) if piece.part else {}
    ranges = cuts.pop(0, None)
    quantised = shards[piece.name].dtype == FLOAT8
    scale = shards.read(f"{piece.name}_scale_inv", piece.index).float() if quantised else None
    done = 0
    for first, block in shards.rows(piece.name, piece.index, ranges):
        if scale is not None:
            rows = torch.arange(first, first + len(block)) // BLOCK
            columns = torch.arange(block.shape[1]) // BLOCK
            block = block.float().mul_(scale[rows][:, columns])
        target[done : done + len(block)].copy_(Slice(tuple(block.shape), tuple(cuts.items())).of(block))
        done += len(block)
