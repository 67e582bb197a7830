"""What every rank of a server must be given alike."""

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
from hybrid_moe_ref.parallel.shares import expert_sharing, local_config

CHECKS = ("observe", "agree", "strict")
"""How strongly ranks are kept in step.

observe  every collective is passed to an observer, and nothing is refused
agree    C1 compares the schedules of all ranks, and the requests and tokens of the ranks of a tp group; each rank is
         held to its schedule: a collective that is not the schedule's next entry is refused before it is issued
strict   besides, all members of a collective compare it through the store before it is issued, sizes and all
"""

TAIL_BYTES = 4096
"""How much of each file of weights `content_digest` reads."""


@dataclass(frozen=True)
class ServerConfig(Config):
    """The model, its layout, the bounds of the serve loop, the seed of random weights, and one of CHECKS.

    ``checkpoint`` is a folder in Hugging Face's format; "" draws the weights from ``seed``. ``allow_unsafe`` starts
    what would be refused because nothing keeps it free of deadlock (see `refusal`).
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
            raise ConfigError(f"unknown strength {self.checks!r}{nearest(self.checks, CHECKS)}", "checks")
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
        """The model that an engine holds: without its draft layer when nothing drafts."""
        return self.model if self.engine.num_drafts else dataclasses.replace(self.model, num_mtp_layers=0)

    def shared_text(self) -> str:
        """All values that must be equal on every rank, as one line of JSON. Folders may differ from host to host;
        what is in the checkpoint's may not."""
        shared = self.to_mapping()
        del shared["allow_unsafe"], shared["engine"]["cache_dir"]
        shared["checkpoint"] = content_digest(self.checkpoint) if self.checkpoint else ""
        return json.dumps(shared, sort_keys=True)

    def digest(self) -> int:
        """31 bits that differ, with near certainty, when any shared value does."""
        return int.from_bytes(hashlib.sha256(self.shared_text().encode()).digest()[:4], "big") >> 1


def content_digest(folder: str) -> str:
    """Digest of a checkpoint that reads little of it: config, index, and of each file of weights its name, size and
    last bytes. Two copies have the same; two trainings of one model differ."""
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


def configuration_differences(texts: Sequence[str]) -> str:
    """The values that differ between ranks, each with who has what; `texts` are those of `shared_text`, by rank."""
    values = [_flat(json.loads(text)) for text in texts]
    names = [name for name in values[0] if len({json.dumps(mapping.get(name)) for mapping in values}) > 1]
    return "; ".join(_sides(name, [mapping.get(name) for mapping in values]) for name in names)


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
