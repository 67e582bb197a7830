"""Load a command's model: from a checkpoint folder, or from a preset with random weights."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid_moe_ref.config import DTYPES, PRESETS, ConfigError, InputError, ModelConfig, nearest

if TYPE_CHECKING:
    from hybrid_moe_ref.model import HybridMoE

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A model that is not loaded yet.

    name         the name that the user gave
    folder       the checkpoint's folder; None for a preset
    saved_dtype  dtype of the checkpoint; None if the checkpoint does not say
    """

    name: str
    config: ModelConfig
    folder: Path | None = None
    saved_dtype: str | None = None

    @classmethod
    def of(cls, name: str, *, only_folders: bool = False) -> "Source":
        """Return the source for the checkpoint folder or preset `name`.

        only_folders: accept no preset

        Raises InputError if `name` is neither a folder with a config.json nor an accepted preset, and CheckpointError
        if the checkpoint is damaged.
        """
        folder = Path(name)
        if (folder / "config.json").exists():
            from hybrid_moe_ref import checkpoint

            config, saved_dtype = checkpoint.read_config(folder)
            return cls(name, checkpoint.with_mtp_of(config, checkpoint.Shards(folder)), folder, saved_dtype)
        if folder.exists():
            raise InputError(f"{name}: the folder has no config.json")
        if name in PRESETS and not only_folders:
            return cls(name, PRESETS[name])
        if _HUB_ID.fullmatch(name) and not name.startswith("."):
            download = f"hf download {name} --local-dir DIR"
            raise InputError(
                f"{name!r} is not a folder; if it is a Hub id, download it first ({download}) and give DIR"
            )
        if only_folders:
            raise InputError(f"{name!r}: the folder does not exist")
        raise InputError(f"{name!r} is neither a folder nor a preset ({', '.join(PRESETS)}){nearest(name, PRESETS)}")

    def dtype(self, requested: str | None) -> str:
        """Return the name of the dtype to compute in: `requested` by the user, or the checkpoint's if this is None.

        If the checkpoint's dtype is needed, but is unknown or not one of DTYPES, return "float32".
        """
        return requested or (self.saved_dtype if self.saved_dtype in DTYPES else None) or "float32"

    def suggestion(self, requested: str | None) -> str:
        """Return advice for an error about too little memory, to append to its text; "" if there is no advice.

        requested: the dtype that the user requested; None if there is no `--dtype`
        """
        if self.folder is None and requested is None:
            return "; a preset's default dtype is float32, --dtype bfloat16 takes half the memory"
        return ""


def load(args: argparse.Namespace, source: Source, lengths: Sequence[int] = ()) -> "HybridMoE":
    """Load the model with the options `--dtype`, `--device`, `--kernels` and `--seed`.

    lengths: the lengths of the sequences that the caller will cache; the memory check counts this cache too

    Raises InputError if model and cache do not fit into memory, or if the device cannot compute in the dtype.
    """
    import torch

    from hybrid_moe_ref.generation.greedy import pages_needed
    from hybrid_moe_ref.memory import check_memory
    from hybrid_moe_ref.model import HybridMoE, check_device

    dtype = getattr(torch, source.dtype(args.dtype))
    check_device(args.device, dtype)
    model = HybridMoE(source.config, device="meta", dtype=dtype)
    check_memory(model, pages_needed(model, list(lengths)), args.device, suggestion=source.suggestion(args.dtype))
    use_kernels(args.kernels)
    if source.folder is not None:
        return HybridMoE.from_pretrained(source.folder, dtype=dtype if args.dtype else None, device=args.device)
    return model.init_weights(args.seed, args.device)


def use_kernels(choice: str | None) -> None:
    """Select the implementation of the kernels for this process and for processes that it forks.

    choice: "auto" or the name of a backend, such as "native"; None keeps the current choice

    Raises ConfigError for an unknown choice.
    """
    from hybrid_moe_kernels import registry

    try:
        registry.use(choice or registry.choice())
    except ValueError as error:
        raise ConfigError(str(error)) from None
