"""Write a model's parameters into a folder of safetensors files.

Each file is written under a temporary name, and renamed when it is complete. config.json is written last. So a folder
with a config.json is complete.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.checkpoint.families import OWN, TEXT, family_of, to_json
from hybrid_moe_ref.checkpoint.shards import INDEX, SINGLE
from hybrid_moe_ref.config import nearest
from hybrid_moe_ref.layers.gated_delta_net import GatedDeltaNet
from hybrid_moe_ref.layers.moe import Experts

if TYPE_CHECKING:
    from hybrid_moe_ref.model import HybridMoE


@torch.no_grad()
def save(
    model: "HybridMoE", folder: str | Path, *, family: str | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a model into a folder.

    family            the model type to save as; None: the type that fits the model's layers
    max_shard_bytes   largest size of a file in bytes; a tensor that is larger gets a file of its own

    Raises CheckpointError if the model does not fit the family or holds only a part of its parameters. Raises OSError
    if a file cannot be written.
    """
    family = family or family_of(model.config)
    _check(model, family)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = total = 0
    for name, tensor in tensors(model, family):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, tensor))
        size += tensor.nbytes
        total += tensor.nbytes
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    (folder / "config.json").unlink(missing_ok=True)
    for file in (SINGLE, INDEX):
        (folder / file).unlink(missing_ok=True)
    for file, shard in zip(files, shards, strict=True):
        _write(folder / file, shard)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    dtype = str(model.dtype).removeprefix("torch.")
    _write_json(folder / "config.json", to_json(model.config, family, dtype, model.stop_ids))


def _check(model: "HybridMoE", family: str) -> None:
    config = model.config
    if family not in (OWN, *TEXT):
        families = (OWN, *TEXT)
        raise CheckpointError(f"family {family!r} is not one of {', '.join(families)}{nearest(family, families)}")
    if family != OWN and "M" in config.layer_pattern:
        raise CheckpointError(
            f"the family {family} has no Mamba-2 layers, but the model has {config.layer_pattern.count('M')}"
        )
    if family != OWN and (family == "qwen3_5_text") == bool(config.num_experts):
        raise CheckpointError(f"the model has {config.num_experts} experts, so it cannot be saved as {family}")
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.num_local != module.num_experts:
            raise CheckpointError(
                f"{name} holds {module.num_local} of {module.num_experts} experts, but only a whole model can be saved"
            )
    if model.slices:
        raise CheckpointError(
            f"the model holds only a part of {len(model.slices)} parameters, but only a whole model can be saved"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("the model's parameters are on the meta device, so they have no values to save")


def tensors(model: "HybridMoE", family: str) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) pairs in the checkpoint format of `family`. Parameters that are tied are yielded once."""
    nets = {
        name: module
        for name, module in model.named_modules()
        if family == "qwen3_next" and isinstance(module, GatedDeltaNet)
    }
    for name, parameter in model.named_parameters():
        net_name, _, rest = name.partition(".in_proj_")
        if net_name in nets and rest:
            if rest == "qkv.weight":
                yield from _grouped(net_name, nets[net_name])
        else:
            yield name, parameter


def _grouped(name: str, net: GatedDeltaNet) -> Iterator[tuple[str, Tensor]]:
    """Yield the (name, tensor) pairs of a GDN layer's projections as Qwen3-Next stores them, in two tensors.

    For each key head, one has a block [q | k | v of its value heads | z of its value heads], the other a block [b | a].

    name: the name of the layer in the checkpoint
    """
    heads, keys = net.num_key_heads, net.num_key_heads * net.key_dim
    q, k, v = net.in_proj_qkv.weight.split([keys, keys, net.num_value_heads * net.value_dim])
    qkvz = [x.unflatten(0, (heads, -1)) for x in (q, k, v, net.in_proj_z.weight)]
    ba = [x.unflatten(0, (heads, -1)) for x in (net.in_proj_b.weight, net.in_proj_a.weight)]
    yield f"{name}.in_proj_qkvz.weight", torch.cat(qkvz, dim=1).flatten(0, 1)
    yield f"{name}.in_proj_ba.weight", torch.cat(ba, dim=1).flatten(0, 1)


def _write(path: Path, shard: list[tuple[str, Tensor]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: tensor.detach().contiguous() for name, tensor in shard}, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
