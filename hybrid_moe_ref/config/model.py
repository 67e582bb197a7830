"""The sizes of a hybrid MoE model."""

from dataclasses import dataclass

from hybrid_moe_ref.config.base import Config, ConfigError, at_least, finite, multiple

LAYER_KINDS = {"G": "linear_attn", "A": "self_attn", "M": "mamba"}


@dataclass(frozen=True)
class ModelConfig(Config):
    """Sizes of a hybrid MoE.

    layer_pattern     one letter per layer; spaces are ignored. G: Gated DeltaNet, A: gated attention, M: Mamba-2
    num_experts       number of routed experts of each layer's MoE; 0: each layer has a dense gated MLP instead
    intermediate_size intermediate size of the dense MLP, if there is no MoE
    num_mtp_layers    number of layers for multi-token prediction: 0 or 1

    The other names are those of Hugging Face's configurations.

    Raises ConfigError for sizes that do not fit together.
    """

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
    # other
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
        at_least(self, 1, "vocab_size", "hidden_size")
        if "A" in self.layer_pattern:
            self._check_attention()
        if "G" in self.layer_pattern:
            at_least(self, 1, "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")
            at_least(self, 1, "linear_value_head_dim")
            at_least(self, 2, "linear_conv_kernel_dim")
            multiple(self, "linear_num_value_heads", "linear_num_key_heads")
        if "M" in self.layer_pattern:
            at_least(self, 1, "mamba_num_heads", "mamba_head_dim", "mamba_state_size", "mamba_num_groups")
            at_least(self, 2, "mamba_conv_kernel_dim")
            multiple(self, "mamba_num_heads", "mamba_num_groups")
            if not 0 <= self.mamba_time_step_min < float("inf"):
                raise ConfigError(f"{self.mamba_time_step_min} must be a number of at least 0", "mamba_time_step_min")
            if self.mamba_time_step_max is not None and not self.mamba_time_step_max >= self.mamba_time_step_min:
                limits = f"{self.mamba_time_step_max} is less than mamba_time_step_min {self.mamba_time_step_min}"
                raise ConfigError(limits, "mamba_time_step_max")
        self._check_mlp()
        at_least(self, 0, "num_mtp_layers")
        if self.num_mtp_layers:
            self._check_attention()
            if self.num_mtp_layers > 1:
                raise ConfigError(f"{self.num_mtp_layers} layers are not implemented, only 0 or 1", "num_mtp_layers")
        finite(self, "rms_norm_eps")

    def _check_attention(self) -> None:
        at_least(self, 1, "num_attention_heads", "num_key_value_heads", "head_dim")
        multiple(self, "num_attention_heads", "num_key_value_heads")
        finite(self, "rope_theta")
        if not 0 <= self.partial_rotary_factor <= 1:
            raise ConfigError(f"{self.partial_rotary_factor} is not between 0 and 1", "partial_rotary_factor")
        if self.rotary_dim % 2:
            raise ConfigError(
                f"{self.partial_rotary_factor} of head_dim {self.head_dim} is {self.rotary_dim}, but must be an even "
                "number",
                "partial_rotary_factor",
            )

    def _check_mlp(self) -> None:
        at_least(self, 0, "num_experts")
        if self.num_experts == 0:
            at_least(self, 1, "intermediate_size")
            return
        at_least(self, 1, "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
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
        """Return the number of dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)
