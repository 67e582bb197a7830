"""What one run is: scenario, variant and everything that must be equal on every rank, as one JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.config import Config, ConfigError, EngineConfig, ModelConfig, ParallelConfig, preset
from hybrid_moe_ref.engine.scheduler import Request
from hybrid_moe_ref.engine.server_config import CHECKS, ServerConfig
from hybrid_moe_ref.files import read_json
from hybrid_moe_ref.pages import PageLayout, page_layout
from repro.lab.workload import WorkloadConfig, draw_requests
from repro.store.description import VARIANTS
from repro.trace.format import Geometry

BACKENDS = ("gloo", "nccl")
MAX_CONFIG_BYTES = 1 << 20
MAX_WORK = 100_000
"""Tokens and idle steps of all ranks together, drawn at most: each verdict on a run goes through them."""

MAX_RING_RECORDS = 1 << 20  # 72 MiB a rank
KERNEL_CACHES = ("cold", "warm", "split")

LARGEST: dict[str, float] = {
    "num_ranks": 1024,
    "tp_size": 1024,
    "drawn_for": 1024,
    "ring_records": MAX_RING_RECORDS,
    "seed": 2**63 - 1,
    "quiet_window_s": 1e6,
    "deadline_s": 1e6,
    "group_timeout_s": 1e6,
    "engine.collective_limit_s": 1e6,
    "model.layer_pattern": 256,
    "engine.capture_sizes": 256,
}
"""What a number may be at most, or how long a list or text. Others: 1,000,000, 1e12 for a float, 4096 characters."""

# Served in float64: a sum in another order then changes a logit by 1e-15, not 1e-6, so greedy tokens and expert
# choices equal the single-process model's on every seed, and a difference means a fault, not rounding.
DEFAULT_ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, num_pages=64, dtype="float64")


@dataclass(frozen=True)
class RunSettings(Config):
    """One run of one variant. This is config.json, and with ``--config`` a user's file of the same keys.

    kernel_cache     what the run's own cache of compiled kernels holds at the start: "cold" nothing, "warm" all;
                     "split": every rank has a cache of its own, and rank 0's alone is cold
    ring_records     how many events a rank's witness keeps; what each group did last it keeps anyway
    drawn_for        for how many dp ranks requests are drawn, which those that there are share; 0: for these
    group_timeout_s  after how long a collective gives up; 0: long after the deadline
    """

    scenario: str
    variant: str = "fault"
    num_ranks: int = 8
    backend: str = "gloo"
    quiet_window_s: float = 1.0
    deadline_s: float = 120.0
    seed: int = 0
    checks: str = ""
    tp_size: int = 1
    allow_unsafe: bool = False
    expert_parallel: bool = True
    kernel_cache: str = ""
    group_timeout_s: float = 0.0
    drawn_for: int = 0
    ring_records: int = Geometry().ring_records
    model: ModelConfig = field(default_factory=lambda: preset("tiny"))
    engine: EngineConfig = DEFAULT_ENGINE
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)

    def __post_init__(self) -> None:
        _check_bounds(self)
        if self.variant not in VARIANTS:
            raise ConfigError(f"unknown variant {self.variant!r}; known: {', '.join(VARIANTS)}", "variant")
        if self.backend not in BACKENDS:
            raise ConfigError(f"unknown backend {self.backend!r}; known: {', '.join(BACKENDS)}", "backend")
        if self.num_ranks < 2:
            raise ConfigError(f"{self.num_ranks} ranks cannot wait for each other; at least 2", "num_ranks")
        if self.tp_size < 1 or self.num_ranks % self.tp_size:
            raise ConfigError(f"{self.num_ranks} ranks do not divide into groups of {self.tp_size}", "tp_size")
        if self.model.num_experts % self.num_ranks:
            raise ConfigError(
                f"{self.model.num_experts} experts do not divide over {self.num_ranks} ranks", "num_ranks"
            )
        if self.checks and self.checks not in CHECKS:
            raise ConfigError(f"unknown strength {self.checks!r}; known: {', '.join(CHECKS)}", "checks")
        if self.kernel_cache and self.kernel_cache not in KERNEL_CACHES:
            raise ConfigError(f"unknown state {self.kernel_cache!r}; known: {', '.join(KERNEL_CACHES)}", "kernel_cache")
        if self.drawn_for < 0:
            raise ConfigError(f"{self.drawn_for} is not a number of dp ranks", "drawn_for")
        if self.ring_records < 64 or self.ring_records % 2:
            wanted = f"an even number of events in 64..{MAX_RING_RECORDS}"
            raise ConfigError(f"{self.ring_records} is not {wanted}", "ring_records")
        if not self.group_timeout_s >= 0:
            raise ConfigError(f"{self.group_timeout_s} is not a number of seconds", "group_timeout_s")
        for name in ("quiet_window_s", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{getattr(self, name)} is not a positive number of seconds", name)
        if self.workload.max_prompt_tokens > self.engine.max_num_batched_tokens:
            raise ConfigError(
                f"{self.workload.max_prompt_tokens} is more than engine.max_num_batched_tokens "
                f"{self.engine.max_num_batched_tokens}",
                "workload.max_prompt_tokens",
            )

        self._check_work()
        self._check_pages()

    def _check_work(self) -> None:
        """Refuse a workload that takes long to draw, which every command that judges a run does."""
        work, num_ranks = self.workload, self.drawn_for or self.num_ranks // self.tp_size
        of_a_rank = work.max_requests * (work.max_prompt_tokens + work.max_new_tokens) + work.max_arrival_step
        if num_ranks * of_a_rank > MAX_WORK:
            raise ConfigError(
                f"up to {num_ranks * of_a_rank} tokens and steps of {num_ranks} dp ranks, at most {MAX_WORK}; "
                "choose smaller max_requests, max_new_tokens or max_arrival_step",
                "workload",
            )

    def _check_pages(self) -> None:
        """A cache that may become full is refused: what scenarios expect of a run assumes that no rank preempts."""
        try:
            layout = self.page_layout()
        except ConfigError as error:  # heads that do not divide over the ranks
            raise ConfigError(error.message, f"model.{error.field}") from None
        longest = self.workload.max_prompt_tokens + self.workload.max_new_tokens
        needed = self.engine.max_num_seqs * layout.pages_for(longest)
        if self.engine.num_pages < needed:
            raise ConfigError(
                f"{self.engine.num_pages} is less than {needed}, which {self.engine.max_num_seqs} sequences "
                f"of {longest} tokens take",
                "engine.num_pages",
            )

    def page_layout(self) -> PageLayout:
        """The pages of a rank's cache. A page of a tp rank holds fewer tokens than one of the whole model."""
        itemsize = {"float64": 8, "float32": 4}.get(self.engine.dtype, 2)
        return page_layout(self.model, itemsize, ssm_itemsize=max(4, itemsize), tp_size=self.tp_size)

    @classmethod
    def from_document(
        cls,
        document: Mapping[str, Any],
        flags: Mapping[str, Any],
        where: str,
        defaults: Mapping[str, Any] | None = None,
    ) -> RunSettings:
        """Settings from a user's JSON document over a scenario's defaults, with the command line's flags on top.

        ``model`` may name a ``preset`` and override single fields of it; ``engine`` and ``workload`` override
        single defaults. Raises ConfigError with the path of what is wrong.
        """
        if document.get("scenario", flags["scenario"]) != flags["scenario"]:
            raise ConfigError(f"{document['scenario']!r} is not the scenario to run, {flags['scenario']!r}", where)
        defaults = defaults or {}
        merged: dict[str, Any] = {**defaults, **document, **flags}
        for part in {"model", "engine", "workload"} & merged.keys():
            path = f"{where}.{part}" if where else part
            if not isinstance(merged[part], Mapping):
                raise ConfigError(f"wanted a mapping, got {merged[part]!r}"[:80], path)
            overrides = {**defaults.get(part, {}), **merged[part]}
            base: Config = WorkloadConfig() if part == "workload" else DEFAULT_ENGINE
            if part == "model":
                name = overrides.pop("preset", "tiny")
                if not isinstance(name, str):
                    raise ConfigError(f"wanted str, got {name!r}"[:80], f"{path}.preset")
                base = preset(name)
            merged[part] = type(base).from_mapping({**base.to_mapping(), **overrides}, path)
        return cls.from_mapping(merged, where)

    def server(self) -> ServerConfig:
        """What the engine of every rank is given."""
        dp_size = self.num_ranks // self.tp_size
        parallel = ParallelConfig(dp_size, self.tp_size, self.expert_parallel)
        return ServerConfig(
            self.model, parallel, self.engine, self.seed, self.effective_checks, allow_unsafe=self.starts_unsafe
        )

    @property
    def starts_unsafe(self) -> bool:
        """Whether what a server would refuse is started all the same: as asked for, and always a fault."""
        return self.allow_unsafe or self.variant == "fault"

    @property
    def effective_checks(self) -> str:
        """As asked for; else off in a `fault` run, which is to hang, and on in the others."""
        return self.checks or ("observe" if self.variant == "fault" else "agree")

    @property
    def effective_kernel_cache(self) -> str:
        """As asked for; else warm in a `control` run, where nothing is to be built, and cold in the others."""
        return self.kernel_cache or ("warm" if self.variant == "control" else "cold")

    def requests(self) -> list[list[Request]]:
        """The requests of every rank; the tp ranks of one dp rank run the same ones."""
        dp_size = self.num_ranks // self.tp_size
        drawn = draw_requests(self.workload, self.drawn_for or dp_size, self.model.vocab_size, self.seed)
        shared = [[request for requests in drawn[rank::dp_size] for request in requests] for rank in range(dp_size)]
        return [requests for requests in shared for _ in range(self.tp_size)]

    def reference_key(self) -> tuple[Any, ...]:
        """Equal for two runs whose requests and single-process answers are the same."""
        return self.model, self.engine.dtype, self.workload, self.drawn_for or self.num_ranks // self.tp_size, self.seed


def _check_bounds(config: Config, where: str = "") -> None:
    """Raise ConfigError for the first number, list or text beyond :data:`LARGEST`, in this or a nested config."""
    for name, value in vars(config).items():
        path = f"{where}{name}"
        if isinstance(value, Config):
            _check_bounds(value, f"{path}.")
        elif isinstance(value, str | tuple):
            if len(value) > LARGEST.get(path, 4096):
                raise ConfigError(f"{len(value)} is longer than {LARGEST.get(path, 4096)}", path)
        elif isinstance(value, int | float):
            largest = LARGEST.get(path, 1_000_000 if isinstance(value, int) else 1e12)
            if abs(value) > largest:
                raise ConfigError(f"{value} is more than {largest:,.0f}", path)


def read_settings(path: Path) -> RunSettings:
    """The settings of a run from its config.json.

    Raises OSError, DamagedFile for what is not JSON, ConfigError with the path of what is wrong in it.
    """
    return RunSettings.from_mapping(read_json(path, MAX_CONFIG_BYTES), str(path))
