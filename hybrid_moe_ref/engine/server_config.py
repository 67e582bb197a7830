"""The configuration that must be equal on every rank of a server."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import Config, ConfigError, EngineConfig, ModelConfig, ParallelConfig, nearest
from hybrid_moe_ref.files import open_regular
from hybrid_moe_ref.parallel.sharding.shares import expert_sharing, local_config

CHECKS = ("observe", "agree", "strict")
"""How strictly collectives are checked.

observe  report every collective to the observer, and refuse none, except in the replay of a graph: there, a collective
         that the captured step did not issue is refused
agree    the step agreement (C1) compares the schedules of all ranks, and the requests and tokens of the ranks of a tp
         group; a collective that is not the next entry of the rank's schedule is refused before it is issued
strict   in addition, all members of a collective compare it, with its sizes, through the store before it is issued
"""

TAIL_BYTES = 4096
"""How many bytes at the end of each weight file `content_digest` reads."""


@dataclass(frozen=True)
class ServerConfig(Config):
    """The configuration of a server.

    parallel      how many ranks share the model, and how
    engine        limits and options of the serve loop
    seed          seed of random weights
    checks        how the ranks check their collectives: not at all ("observe"); against the schedule that all ranks
                  have compared in C1 ("agree"); or also with each other before each collective ("strict")
    checkpoint    a folder in Hugging Face's format; "" for random weights
    allow_unsafe  start the server even if its ranks could deadlock; otherwise such a configuration is refused
    """

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    seed: int = 0
    checks: str = "agree"
    checkpoint: str = ""
    allow_unsafe: bool = False

    def __post_init__(self) -> None:
        if self.checks not in CHECKS:
            raise ConfigError(
                f"checks: {self.checks!r} is not one of {', '.join(CHECKS)}{nearest(self.checks, CHECKS)}", "checks"
            )
        self.parallel.check(self.model)
        if self.engine.num_drafts and not self.model.num_mtp_layers:
            raise ConfigError(
                f"{self.engine.num_drafts} drafts, but the model has no MTP layer (model.num_mtp_layers is 0)",
                "engine.num_drafts",
            )
        if self.parallel.tp_size > 1:
            local_config(self.model, self.parallel.tp_size, expert_sharing(self.parallel))

    @property
    def served_model(self) -> ModelConfig:
        """Return the configuration of the model that an engine holds: `model`, but no MTP layer if num_drafts is 0."""
        return self.model if self.engine.num_drafts else dataclasses.replace(self.model, num_mtp_layers=0)

    def shared(self) -> dict[str, Any]:
        """Return all settings that must be equal on every rank: all except `allow_unsafe` and `engine.cache_dir`.

        The paths of folders can differ between hosts. So the path of the checkpoint is replaced by a digest of its
        content.
        """
        shared = self.to_mapping()
        del shared["allow_unsafe"], shared["engine"]["cache_dir"]
        shared["checkpoint"] = content_digest(self.checkpoint) if self.checkpoint else ""
        return shared


def content_digest(folder: str) -> str:
    """Compute a digest of a checkpoint from a small part of its bytes.

    The digest covers all JSON files, and the name, size and last TAIL_BYTES bytes of each weight file. Two copies of a
    checkpoint have the same digest, and two trainings of one model have different digests.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix == ".json":
            with open_regular(path) as file:
                digest.update(path.name.encode() + file.read())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            with open_regular(path) as file:
                file.seek(max(0, size - TAIL_BYTES))
                digest.update(f"{path.name} {size} ".encode() + file.read())
    return digest.hexdigest()[:16]


def configuration_differences(texts: Sequence[str]) -> list[str]:
    """Return a line for each setting that differs between ranks. texts: each rank's settings as JSON"""
    values = [_flat(json.loads(text)) for text in texts]
    names = dict.fromkeys(name for settings in values for name in settings)
    columns = {name: [settings.get(name) for settings in values] for name in names}
    return [_sides(name, column) for name, column in columns.items() if len(set(map(json.dumps, column))) > 1]


def _sides(name: str, values: Sequence[Any]) -> str:
    sides: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        sides.setdefault(json.dumps(value), []).append(rank)
    return f"{name} is " + " and ".join(
        f"{value} on rank{'s' * (len(ranks) > 1)} {','.join(map(str, ranks))}" for value, ranks in sides.items()
    )


def _flat(mapping: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return flat
