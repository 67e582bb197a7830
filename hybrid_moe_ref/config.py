"""The configuration of a model, its layout and its engine: frozen dataclasses, validated here and nowhere else.

A `ConfigError` names the field by its path and both numbers that disagree. This module does not import torch.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

LAYER_KINDS = {"G": "linear_attn", "A": "self_attn", "M": "mamba"}
ENGINE_MODES = ("eager", "graphs")
GDN_PREFILL_BACKENDS = ("auto", "torch", "triton", "jit")
MOE_BACKENDS = ("auto", "torch", "jit")
DTYPES = ("float32", "float64", "bfloat16", "float16")


class InputError(ValueError):
    """The user's input cannot be used. The text is one line for the user."""


class ConfigError(InputError):
    """A configuration that cannot work; the text starts with the path of the field."""

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.message = message
        self.field = field


class Config:
    """A base class for configuration dataclasses, with strict conversion from and to JSON-like mappings."""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], where: str = "") -> Self:
        """Build from `mapping`, refusing unknown keys and wrong types; `where` is the path put before field
        names."""
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"wanted a mapping, got {_type_name(mapping)}", where)
        assert dataclasses.is_dataclass(cls)
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in mapping:
            if key not in fields:
                raise ConfigError(f"unknown key{nearest(str(key), fields)}", _join(where, str(key)))
        for name, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and name not in mapping:
                raise ConfigError("required, but missing", _join(where, name))
        values = {key: _convert(value, hints[key], _join(where, key)) for key, value in mapping.items()}
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(error.message, _join(where, error.field)) from None

    def to_mapping(self) -> dict[str, Any]:
        """The inverse of `from_mapping`; only JSON types."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint " (did you mean ...?)" if one of the ``known`` names is similar; else ""."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where and name else where or name


def _type_name(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:80]


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """Convert `value` to the annotated type. An int is accepted as a float; a bool is not accepted as an int."""
    if isinstance(annotation, types.UnionType):
        if value is None and types.NoneType in annotation.__args__:
            return None
        annotation = next(arg for arg in annotation.__args__ if arg is not types.NoneType)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"wanted a list, got {_type_name(value)}", where)
        item_type = typing.get_args(annotation)[0]
        return tuple(_convert(item, item_type, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return value if isinstance(value, annotation) else annotation.from_mapping(value, where)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{_type_name(value)} has no room in 64 bits", where)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ConfigError(f"wanted {annotation.__name__}, got {_type_name(value)}", where)
    return value


def _at_least(config: object, minimum: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < minimum:
            raise ConfigError(f"{value} is less than {minimum}", name)


def _finite(config: object, name: str) -> None:
    value = getattr(config, name)
    if not 0 < value < float("inf"):
        raise ConfigError(f"{value} is not positive and finite", name)


def _multiple(config: object, name: str, of: str) -> None:
    value, divisor = getattr(config, name), getattr(config, of)
    if value % divisor:
        raise ConfigError(f"{value} is not a multiple of {of} {divisor}", name)


@dataclass(frozen=True)
class ModelConfig(Config):
    """Sizes of a hybrid MoE. `layer_pattern` has a letter per layer, spaces ignored:
    G = Gated DeltaNet, A = gated attention, M = Mamba-2. Every layer is followed by an MLP: an MoE when
    `num_experts` > 0, else a dense gated MLP of `intermediate_size`."""

    layer_pattern: str
    vocab_size: int
    hidden_size: int
    # gated attention
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    rope_theta: float = 1e7
    partial_rotary_factor: float = 0.25
    # Gated DeltaNet
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    # Mamba-2
    mamba_num_heads: int = 32
    mamba_head_dim: int = 64
    mamba_state_size: int = 128
    mamba_num_groups: int = 1
    mamba_conv_kernel_dim: int = 4
    mamba_conv_bias: bool = True
    mamba_time_step_min: float = 0.0
    mamba_time_step_max: float | None = None
    # MoE
    num_experts: int = 512
    num_experts_per_tok: int = 10
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    intermediate_size: int = 0
    # the rest
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer_pattern", "".join(self.layer_pattern.split()))
        if not self.layer_pattern:
            raise ConfigError("the pattern has no layer", "layer_pattern")
        for index, kind in enumerate(self.layer_pattern):
            if kind not in LAYER_KINDS:
                raise ConfigError(f"layer {index} is {kind!r}, not one of {', '.join(LAYER_KINDS)}", "layer_pattern")
        _at_least(self, 1, "vocab_size", "hidden_size")
        if "A" in self.layer_pattern:
            self._check_attention()
        if "G" in self.layer_pattern:
            _at_least(self, 1, "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
            _at_least(self, 1, "linear_value_head_dim")
            _at_least(self, 2, "linear_conv_kernel_dim")
            _multiple(self, "linear_num_value_heads", "linear_num_key_heads")
        if "M" in self.layer_pattern:
            _at_least(self, 1, "mamba_num_heads", "mamba_head_dim", "mamba_state_size", "mamba_num_groups")
            _at_least(self, 2, "mamba_conv_kernel_dim")
            _multiple(self, "mamba_num_heads", "mamba_num_groups")
            if not 0 <= self.mamba_time_step_min < float("inf"):
                raise ConfigError(f"{self.mamba_time_step_min} is not a number of at least 0", "mamba_time_step_min")
            if self.mamba_time_step_max is not None and not self.mamba_time_step_max >= self.mamba_time_step_min:
                limits = f"{self.mamba_time_step_max} is less than mamba_time_step_min {self.mamba_time_step_min}"
                raise ConfigError(limits, "mamba_time_step_max")
        self._check_mlp()
        _at_least(self, 0, "num_mtp_layers")
        if self.num_mtp_layers:
            self._check_attention()
            if self.num_mtp_layers > 1:
                raise ConfigError(f"{self.num_mtp_layers} layers are not implemented, only 1", "num_mtp_layers")
        _finite(self, "rms_norm_eps")

    def _check_attention(self) -> None:
        _at_least(self, 1, "num_attention_heads", "num_key_value_heads", "head_dim")
        _multiple(self, "num_attention_heads", "num_key_value_heads")
        _finite(self, "rope_theta")
        if not 0 <= self.partial_rotary_factor <= 1:
            raise ConfigError(f"{self.partial_rotary_factor} is not between 0 and 1", "partial_rotary_factor")
        if self.rotary_dim % 2:
            raise ConfigError(
                f"{self.partial_rotary_factor} of head_dim {self.head_dim} is odd: {self.rotary_dim}",
                "partial_rotary_factor",
            )

    def _check_mlp(self) -> None:
        _at_least(self, 0, "num_experts")
        if self.num_experts == 0:
            _at_least(self, 1, "intermediate_size")
            return
        _at_least(self, 1, "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"{self.num_experts_per_tok} is more than num_experts {self.num_experts}",
                "num_experts_per_tok",
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_pattern)

    @property
    def rotary_dim(self) -> int:
        """How many of the head's dimensions rotate."""
        return int(self.head_dim * self.partial_rotary_factor)


@dataclass(frozen=True)
class ParallelConfig(Config):
    """The layout: the number of ranks, and how they share the model.

    dp_size           number of dp ranks; each has its own requests
    tp_size           number of tp ranks per dp rank, which share heads and intermediate features
    expert_parallel   distribute whole routed experts over all ranks; else every dp rank has all experts, and each of
                      its tp ranks has a part of each
    """

    dp_size: int = 1
    tp_size: int = 1
    expert_parallel: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "dp_size", "tp_size")

    @property
    def ep_size(self) -> int:
        """The number of ranks that the routed experts are distributed over."""
        return self.dp_size * self.tp_size if self.expert_parallel else 1

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp_size

    def check(self, model: ModelConfig) -> None:
        """Raise a ConfigError when `model` does not divide over these ranks."""
        if model.num_experts % self.ep_size:
            raise ConfigError(
                f"{model.num_experts} experts do not divide over {self.ep_size} ranks"
                f" (dp_size {self.dp_size} x tp_size {self.tp_size})",
                "ep_size",
            )


@dataclass(frozen=True)
class EngineConfig(Config):
    """Limits of one rank's serve loop, and how it runs a step.

    max_num_seqs       most requests that run at once; the others wait in order of arrival
    max_num_batched_tokens
                       most tokens of a step. Running requests come first; new prompts get the rest
    num_pages          pages of a rank's cache; if they do not suffice for all requests, the youngest wait
    unfinished_interval
                       number of steps between two "anyone unfinished?" all-reduces; the ranks can end after each
    dtype              dtype of weights, activations and KV cache: one of DTYPES
    mode               "eager", or "graphs": small steps are padded to a captured size and replayed
    capture_sizes      the captured sizes; () means 1, 2, 4, ... and max_num_seqs, which cover every pure decode step
    microbatch_tokens  a rank with this many tokens proposes to split the step in two; 0: never
    compile            compile the row-wise parts of the layers by torch.compile (needs a C++ compiler on a CPU)
    autotune           time the tactics for computing the experts at start, and agree on the fastest
    cache_dir          folder for tuning results and compiled code. "": tuning results are not saved, and compiled
                       modules go to the user's cache
    gdn_prefill_backend, moe_backend
                       backend of these layers: "auto" selects one from the kernels' registry, "jit" is compiled on
                       this machine, "triton" needs a GPU
    num_drafts         number of tokens that the MTP layer drafts for each request
    collective_limit_s a rank that waits this long in one collective while serving stops all ranks; 0: no limit
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 256
    num_pages: int = 256
    unfinished_interval: int = 32
    dtype: str = "float32"
    mode: str = "eager"
    capture_sizes: tuple[int, ...] = ()
    microbatch_tokens: int = 0
    compile: bool = False
    autotune: bool = False
    cache_dir: str = ""
    gdn_prefill_backend: str = "auto"
    moe_backend: str = "auto"
    num_drafts: int = 0
    collective_limit_s: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_num_seqs", "max_num_batched_tokens", "num_pages", "unfinished_interval")
        _at_least(self, 0, "microbatch_tokens", "num_drafts")
        if not 0 <= self.collective_limit_s < float("inf"):
            raise ConfigError(f"{self.collective_limit_s} is not a number of seconds", "collective_limit_s")
        if self.mode not in ENGINE_MODES:
            raise ConfigError(f"unknown mode {self.mode!r}{nearest(self.mode, ENGINE_MODES)}", "mode")
        for index, size in enumerate(self.capture_sizes):
            if not 1 <= size <= self.max_num_batched_tokens:
                raise ConfigError(
                    f"{size} is not between 1 and max_num_batched_tokens {self.max_num_batched_tokens}",
                    f"capture_sizes[{index}]",
                )
        if self.max_num_batched_tokens < self.max_num_seqs * (1 + self.num_drafts):
            drafts = f" x (1 + num_drafts {self.num_drafts})" if self.num_drafts else ""
            raise ConfigError(
                f"{self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs}{drafts}: "
                "a decode step would not hold the tokens of every sequence",
                "max_num_batched_tokens",
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}{nearest(self.dtype, DTYPES)}", "dtype")
        for name, names in (("gdn_prefill_backend", GDN_PREFILL_BACKENDS), ("moe_backend", MOE_BACKENDS)):
            if (backend := getattr(self, name)) not in names:
                raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(names)}", name)
        if self.autotune and self.moe_backend != "auto":
            raise ConfigError(f"there is nothing to choose with moe_backend {self.moe_backend!r}", "autotune")
        if self.moe_backend == "jit" and self.dtype not in ("float32", "float64"):
            raise ConfigError(f"'jit' computes in float32 and float64, not in dtype {self.dtype}", "moe_backend")

    @property
    def compiles_kernels(self) -> bool:
        """Whether a backend is compiled on this machine ("jit")."""
        return "jit" in (self.gdn_prefill_backend, self.moe_backend)

    @property
    def graph_sizes(self) -> tuple[int, ...]:
        """The captured sizes in ascending order; none in eager mode."""
        if self.mode == "eager":
            return ()
        powers = (1 << exponent for exponent in range(self.max_num_seqs.bit_length()))
        return tuple(sorted({*(self.capture_sizes or (*powers, self.max_num_seqs))}))


def _qwen(layers: int, hidden: int, heads: int, value_heads: int, experts: int, top_k: int, mlp: int) -> ModelConfig:
    return ModelConfig(
        layer_pattern="GGGA" * (layers // 4),
        vocab_size=248320,
        hidden_size=hidden,
        num_attention_heads=heads,
        linear_num_value_heads=value_heads,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=mlp,
        shared_expert_intermediate_size=mlp,
        num_mtp_layers=1,
    )


PRESETS: dict[str, ModelConfig] = {
    # The reproducer's: the real structure, three mixers and 512 experts, at a size for eight processes on two
    # cores.
    "tiny": ModelConfig(
        layer_pattern="GGGA MGGA",
        vocab_size=1024,
        hidden_size=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        mamba_state_size=16,
        mamba_num_groups=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
    # The CPU race against other implementations: benchmarks use it.
    "race": ModelConfig(
        layer_pattern="GGGA GGGA",
        vocab_size=4096,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=4,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    ),
    "qwen3.5-397b-a17b": _qwen(60, 4096, 32, 64, 512, 10, 1024),
    "qwen3.5-122b-a10b": _qwen(48, 3072, 32, 64, 256, 8, 1024),
    "qwen3.5-35b-a3b": _qwen(40, 2048, 16, 32, 256, 8, 512),
    "qwen3-next-80b-a3b": dataclasses.replace(_qwen(48, 2048, 16, 32, 512, 10, 512), vocab_size=151936),
}


def preset(name: str) -> ModelConfig:
    """The named model configuration."""
    if name not in PRESETS:
        hint = nearest(name, PRESETS) or f"; known: {', '.join(PRESETS)}"
        raise ConfigError(f"unknown preset {name!r}{hint}")
    return PRESETS[name]
