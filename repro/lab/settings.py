"""The settings of one run: scenario, variant and everything that must be equal on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_moe_ref.cache.pages import PageLayout, page_layout
from hybrid_moe_ref.config import Config, ConfigError, EngineConfig, ModelConfig, ParallelConfig, preset
from hybrid_moe_ref.engine.server_config import CHECKS, ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Request
from hybrid_moe_ref.files import read_json
from repro.lab.workload import WorkloadConfig, draw_requests
from repro.store.description import VARIANTS
from repro.trace.witness.format import Geometry

BACKENDS = ("gloo", "nccl")
MAX_CONFIG_BYTES = 1 << 20
MAX_WORK = 100_000
"""Largest sum of the tokens and arrival steps of all ranks' requests. The sum is limited because every command that
judges a run generates the requests again."""

MAX_RING_RECORDS = 1 << 20  # 72 MiB for each rank
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
"""Field -> the largest value of a number, or the largest length of a list or text.

Other fields have the limits 1,000,000 (int), 1e12 (float) and 4096 (length).
"""

# With float64 another order of summation changes a logit by 1e-15 instead of 1e-6. So the tokens and expert choices
# equal the single-process model's for every seed, and a difference means a fault, not rounding.
DEFAULT_ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=48, num_pages=64, dtype="float64")


@dataclass(frozen=True)
class RunSettings(Config):
    """The settings of one run of one variant: the content of config.json, and of a user's file for ``--config``.

    deadline_s       seconds after which the watcher ends the run, even without a verdict
    checks           how strictly the ranks check their collectives: "observe", "agree" or "strict"; "" means the
                     default of the variant
    allow_unsafe     start the engine even with a configuration that it otherwise refuses, because ranks could hang
    kernel_cache     the state of the run's own kernel cache at the start. "cold": it is empty. "warm": it contains all
                     compiled kernels. "split": every rank has its own cache, and only the cache of rank 0 is cold. "":
                     the default of the variant
    ring_records     how many of the latest events a rank's witness keeps; the witness also keeps the last collective of
                     each group, even if this collective is older
    drawn_for        the number of dp ranks for which requests are generated; 0 means as many as the run has. If the run
                     has fewer dp ranks, these ranks share the requests. So a small run can serve the same requests as a
                     large run
    group_timeout_s  seconds after which a collective gives up; 0 means that it gives up long after the deadline
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
            raise ConfigError(
                f"{self.num_ranks} is too few: a hang needs at least 2 ranks that wait for each other", "num_ranks"
            )
        if self.tp_size < 1 or self.num_ranks % self.tp_size:
            raise ConfigError(f"{self.num_ranks} ranks cannot be divided into groups of {self.tp_size}", "tp_size")
        if self.model.num_experts % self.num_ranks:
            raise ConfigError(
                f"{self.model.num_experts} experts do not divide over {self.num_ranks} ranks", "num_ranks"
            )
        if self.checks and self.checks not in CHECKS:
            raise ConfigError(f"{self.checks!r} is not one of {', '.join(CHECKS)}", "checks")
        if self.kernel_cache and self.kernel_cache not in KERNEL_CACHES:
            raise ConfigError(
                f"unknown state {self.kernel_cache!r} of the kernel cache; known: {', '.join(KERNEL_CACHES)}",
                "kernel_cache",
            )
        if self.drawn_for < 0:
            raise ConfigError(
                f"{self.drawn_for} is not a number of dp ranks; use 0 for the number that this run has", "drawn_for"
            )
        if self.ring_records < 64 or self.ring_records % 2:
            raise ConfigError(
                f"{self.ring_records} is not an even number of events in 64..{MAX_RING_RECORDS}", "ring_records"
            )
        if not self.group_timeout_s >= 0:
            raise ConfigError(f"{self.group_timeout_s} is not a number of seconds of at least 0", "group_timeout_s")
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
        """Raise ConfigError for a workload that takes long to generate.

        Every command that judges a run generates the run's workload again.
        """
        work, num_ranks = self.workload, self.drawn_for or self.num_ranks // self.tp_size
        of_a_rank = work.max_requests * (work.max_prompt_tokens + work.max_new_tokens) + work.max_arrival_step
        if num_ranks * of_a_rank > MAX_WORK:
            raise ConfigError(
                f"the requests of {num_ranks} dp ranks can take {num_ranks * of_a_rank} tokens and steps, but at most "
                f"{MAX_WORK} are allowed; choose a smaller max_requests, max_new_tokens or max_arrival_step",
                "workload",
            )

    def _check_pages(self) -> None:
        """Raise ConfigError if the cache can become full.

        A rank with a full cache preempts a request, but the predicted verdicts assume that no request is preempted.
        """
        try:
            layout = self.page_layout()
        except ConfigError as error:  # the heads cannot be divided over the ranks
            raise ConfigError(error.message, f"model.{error.field}") from None
        longest = self.workload.max_prompt_tokens + self.workload.max_new_tokens
        needed = self.engine.max_num_seqs * layout.pages_for(longest)
        if self.engine.num_pages < needed:
            raise ConfigError(
                f"{self.engine.num_pages} is less than {needed}, the number of pages that {self.engine.max_num_seqs} "
                f"sequences of {longest} tokens take",
                "engine.num_pages",
            )

    def page_layout(self) -> PageLayout:
        """Return the page layout of a rank's cache.

        With tensor parallelism (tp) a page can hold fewer tokens than without tp.
        """
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
        """Merge a scenario's ``defaults``, a user's JSON ``document`` and the command line's ``flags``.

        The document overrides the defaults, and the flags override both. In the defaults and the document, `engine` and
        `workload` need only the fields that change. `model` needs only the fields that differ from the model that its
        key `preset` names ("tiny" without this key).

        where: the path of the document's file, for error messages

        Raises ConfigError with the path of the wrong value.
        """
        if document.get("scenario", flags["scenario"]) != flags["scenario"]:
            raise ConfigError(
                f"the file is for the scenario {document['scenario']!r}, but the command runs {flags['scenario']!r}",
                where,
            )
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
        """Return the configuration with which the engine of every rank starts."""
        dp_size = self.num_ranks // self.tp_size
        parallel = ParallelConfig(dp_size, self.tp_size, self.expert_parallel)
        return ServerConfig(
            self.model, parallel, self.engine, self.seed, self.effective_checks, allow_unsafe=self.starts_unsafe
        )

    @property
    def starts_unsafe(self) -> bool:
        """Whether the engine starts even with a configuration that it otherwise refuses, because ranks could hang.

        True if ``allow_unsafe`` is set, and in every `fault` run.
        """
        return self.allow_unsafe or self.variant == "fault"

    @property
    def effective_checks(self) -> str:
        """Return the value of ``checks``, or the default if none is set.

        The default is "observe" in a `fault` run, because this run must be able to hang. In other runs it is "agree".
        """
        return self.checks or ("observe" if self.variant == "fault" else "agree")

    @property
    def effective_kernel_cache(self) -> str:
        """Return the value of ``kernel_cache``, or the default if none is set.

        The default is "warm" in a `control` run, because this run builds nothing. In other runs it is "cold".
        """
        return self.kernel_cache or ("warm" if self.variant == "control" else "cold")

    def requests(self) -> list[list[Request]]:
        """Return the requests of each rank. The tp ranks of one dp rank have the same requests."""
        dp_size = self.num_ranks // self.tp_size
        drawn = draw_requests(self.workload, self.drawn_for or dp_size, self.model.vocab_size, self.seed)
        shared = [[request for requests in drawn[rank::dp_size] for request in requests] for rank in range(dp_size)]
        return [requests for requests in shared for _ in range(self.tp_size)]

    def reference_key(self) -> tuple[Any, ...]:
        """Return a key for reference.json: runs with equal keys have the same single-process reference."""
        return self.model, self.engine.dtype, self.workload, self.drawn_for or self.num_ranks // self.tp_size, self.seed


def _check_bounds(config: Config, where: str = "") -> None:
    """Raise ConfigError for the first value above its limit in :data:`LARGEST`.

    The limit of a list or text is its largest length. A value that LARGEST does not name has a default limit.

    where: the path of this config within the settings, such as "model."; "" for the settings themselves
    """
    for name, value in vars(config).items():
        path = f"{where}{name}"
        if isinstance(value, Config):
            _check_bounds(value, f"{path}.")
        elif isinstance(value, str | tuple):
            if len(value) > LARGEST.get(path, 4096):
                raise ConfigError(f"the length {len(value)} is more than {LARGEST.get(path, 4096)}", path)
        elif isinstance(value, int | float):
            largest = LARGEST.get(path, 1_000_000 if isinstance(value, int) else 1e12)
            if abs(value) > largest:
                raise ConfigError(f"{value} is more than {largest:,.0f}", path)


def read_settings(path: Path) -> RunSettings:
    """Read the settings of a run from its config.json.

    Raises OSError if the file cannot be read, DamagedFile if it is not JSON, and ConfigError, with the path of the
    value, for a wrong value.
    """
    return RunSettings.from_mapping(read_json(path, MAX_CONFIG_BYTES), str(path))
