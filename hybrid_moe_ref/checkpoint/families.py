"""Convert the config.json of the supported model families to ModelConfig and back.

The known keys are of three kinds: sizes, settings of which only one value is implemented, and keys that do not matter
for inference. A config.json is refused if it has an unknown key, or a value that is not implemented. The error names
the key.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid_moe_ref.checkpoint.errors import CheckpointError
from hybrid_moe_ref.checkpoint.shards import read_json
from hybrid_moe_ref.config import ConfigError, ModelConfig, nearest

OWN = "hybrid_moe_ref"
MULTIMODAL = {"qwen3_5_moe": "qwen3_5_moe_text", "qwen3_5": "qwen3_5_text"}
TEXT = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")

_LAYER_TYPES = {"linear_attention": "G", "full_attention": "A"}
_SIZES = {
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "rms_norm_eps",
}
_MOE_SIZES = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"}
_TIED = "tie_word_embeddings"
_INTERVAL = "full_attention_interval"
_MTP_LAYERS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
_STOP = "eos_token_id"
_LAYERS = {"num_hidden_layers", "layer_types", _INTERVAL}
_ROPE = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"}
# Keys of which only one value is implemented.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_output_gate": True,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "mtp_use_dedicated_embeddings": False,
    "mamba_ssm_dtype": "float32",
}
# Keys for training, generation and bookkeeping, which do not change a forward pass.
_NO_MATTER = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "model_type",
    "mtp_num_hidden_layers",
    "num_nextn_predict_layers",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_MULTIMODAL_ONLY = {
    "image_token_id",
    "language_model_only",
    "text_config",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
}


def read_config(folder: str | Path) -> tuple[ModelConfig, str | None]:
    """Read a folder's config.json. Returns the configuration, and the name of the saved dtype (None if unknown).

    Raises CheckpointError if the file cannot be read, or if it describes a model that is not supported.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return _model_config(raw), _dtype(raw)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_stop_ids(folder: str | Path) -> tuple[int, ...]:
    """Return the ids of the tokens that end a text: the value of `eos_token_id` in the folder's JSON files.

    Reads config.json only if generation_config.json does not have this key. Returns () if no file has it.

    Raises CheckpointError if the value is neither an id nor a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        raw = read_json(path) if path.exists() else {}
        for key, values in (("", raw), ("text_config.", raw.get("text_config"))):
            ids = values.get(_STOP) if isinstance(values, dict) else None
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(each) is int and each >= 0 for each in ids):
                raise CheckpointError(f"{path}: {key}{_STOP}: must be an id or a list of ids, not {ids!r:.60}")
            return tuple(ids)
    return ()


def family_in(folder: str | Path) -> str:
    """Return the model family of a checkpoint folder: the model_type in its config.json."""
    return str(read_json(Path(folder) / "config.json").get("model_type"))


def _dtype(raw: dict[str, Any]) -> str | None:
    """Return the name of the dtype in which the tensors are saved; None if the config does not say.

    Some multimodal configs have the dtype only in text_config. In an older config, the key is torch_dtype.
    """
    for where in (raw, raw.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            value = where.get(key) if isinstance(where, dict) else None
            if not isinstance(value, str | None):
                raise ConfigError(f"wanted a string, got {value!r:.60}", key)
            if value:
                return value
    return None


def _model_config(raw: dict[str, Any]) -> ModelConfig:
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise ConfigError(f"wanted a string, got {kind!r:.60}", "model_type")
    if kind == OWN:
        return ModelConfig.from_mapping({k: v for k, v in raw.items() if k not in ("model_type", "dtype", _STOP)})
    _check_quantisation(raw.get("quantization_config"))
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    if kind in MULTIMODAL:
        text = raw.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError("missing or not a mapping", "text_config")
        _check_keys(raw, _MULTIMODAL_ONLY | _NO_MATTER, "")
        if text.get("model_type") not in (None, MULTIMODAL[kind]):
            problem = (
                f"{text['model_type']!r} contradicts model_type {kind!r}, whose text model is {MULTIMODAL[kind]!r}"
            )
            raise ConfigError(problem, "text_config.model_type")
        tied = _agreed({f"{place}{_TIED}": values.get(_TIED) for place, values in (("", raw), ("text_config.", text))})
        return _text_config(text | {_TIED: tied}, MULTIMODAL[kind], "text_config")
    if kind not in TEXT:
        kinds = (OWN, *TEXT, *MULTIMODAL)
        raise ConfigError(f"{kind!r} is not one of {', '.join(kinds)}{nearest(kind, kinds)}", "model_type")
    return _text_config(raw, kind, "")


def _agreed(said: dict[str, Any]) -> Any:
    """Return the value of a setting that can stand at several paths of a config; None if it stands at none of them.

    said: for each path, the value at this path; a value of None means that the config has nothing at this path

    Raises ConfigError if the values at two paths differ.
    """
    there = [(path, value) for path, value in said.items() if value is not None]
    for path, value in there[1:]:
        if value != there[0][1]:
            raise ConfigError(f"{there[0][1]!r:.60} contradicts {path} {value!r:.60}", there[0][0])
    return there[0][1] if there else None


def _text_config(text: dict[str, Any], kind: str, where: str) -> ModelConfig:
    dense = kind == "qwen3_5_text"
    sizes = _SIZES | ({"intermediate_size"} if dense else _MOE_SIZES)
    unused = set() if dense else {"intermediate_size"}  # Qwen3-Next writes it although it has no dense layers
    _check_keys(text, sizes | unused | _LAYERS | _ROPE | _FIXED.keys() | _NO_MATTER, where)
    prefix = f"{where}." if where else ""
    for key, implemented in _FIXED.items():
        if text.get(key) not in (None, implemented):
            raise ConfigError(f"{text[key]!r} is not implemented, only {implemented!r}", prefix + key)
    for key in sorted(sizes - text.keys()):
        raise ConfigError("required, but missing", prefix + key)
    values: dict[str, Any] = {key: text[key] for key in sizes} | _rope(text, prefix)
    values["layer_pattern"] = _layer_pattern(text, prefix)
    values[_TIED] = False if text.get(_TIED) is None else text[_TIED]
    values["num_mtp_layers"] = _agreed({prefix + key: text.get(key) for key in _MTP_LAYERS}) or 0
    if dense:
        values["num_experts"] = 0
    return ModelConfig.from_mapping(values, where)


def _check_keys(raw: dict[str, Any], keys: set[str], where: str) -> None:
    for key, value in raw.items():
        if key not in keys and value is not None:
            path = f"{where}.{key}" if where else key
            raise ConfigError(
                f"the key is not known, and its value {value!r:.60} could change the model{nearest(key, keys)}", path
            )


def _layer_pattern(text: dict[str, Any], prefix: str) -> str:
    num_layers, types, interval = (text.get(key) for key in ("num_hidden_layers", "layer_types", _INTERVAL))
    if interval is None and types is None:
        interval = 4
    by_interval = None
    if interval is not None:
        for key, value in (("num_hidden_layers", num_layers), (_INTERVAL, interval)):
            if type(value) is not int or not 1 <= value <= 100_000:
                raise ConfigError(f"must be a positive integer, not {value!r:.60}", prefix + key)
        by_interval = "".join("G" if (index + 1) % interval else "A" for index in range(num_layers or 0))
    if types is None:
        return by_interval or ""
    if not isinstance(types, list):
        raise ConfigError(f"wanted a list, got {types!r:.60}", prefix + "layer_types")
    for index, name in enumerate(types):
        if not isinstance(name, str) or name not in _LAYER_TYPES:
            raise ConfigError(f"{name!r} is not one of {', '.join(_LAYER_TYPES)}", f"{prefix}layer_types[{index}]")
    if num_layers != len(types):
        raise ConfigError(
            f"{num_layers!r} contradicts the number of layer_types, {len(types)}", prefix + "num_hidden_layers"
        )
    pattern = "".join(_LAYER_TYPES[name] for name in types)
    if by_interval not in (None, pattern):
        raise ConfigError(
            f"{interval} gives the layers {by_interval:.60}, but layer_types gives {pattern:.60}", prefix + _INTERVAL
        )
    return pattern


def _rope(text: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return the fields of ModelConfig for the rotary embedding: rope_theta and partial_rotary_factor.

    The keys mrope_* are ignored, because they make a difference only for images and videos.

    text: the part of config.json that describes the language model
    prefix: the path of this part, for errors: "text_config."; "" if it is the whole config
    """
    keys = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
    places = {prefix: text}
    for name in ("rope_parameters", "rope_scaling"):  # the second is the older name
        rope, where = text.get(name), prefix + name
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ConfigError(f"wanted a mapping, got {rope!r:.60}", where)
        for key in ("rope_type", "type"):
            if rope.get(key) not in (None, "default", "mrope"):
                raise ConfigError(f"{rope[key]!r} is not implemented, only 'default'", f"{where}.{key}")
        _check_keys(rope, keys, where)
        places[f"{where}."] = rope
    theta, factor = (
        _agreed({place + key: values.get(key) for place, values in places.items()})
        for key in ("rope_theta", "partial_rotary_factor")
    )
    if theta is None:
        raise ConfigError("required, but missing", prefix + "rope_parameters.rope_theta")
    return {"rope_theta": theta, "partial_rotary_factor": 0.25 if factor is None else factor}


def _check_quantisation(raw: Any) -> None:
    """Raise ConfigError unless `raw` is None or describes float8 weights with one scale per 128 x 128 block.

    `load_weights` dequantises such weights.

    raw: quantization_config of the config.json
    """
    if raw is None:
        return
    if not isinstance(raw, dict):
        raise ConfigError(f"wanted a mapping, got {raw!r:.60}", "quantization_config")
    for key, only in {"quant_method": "fp8", "weight_block_size": [128, 128]}.items():
        if raw.get(key) != only:
            raise ConfigError(f"{raw.get(key)!r} is not implemented, only {only!r}", f"quantization_config.{key}")
    for key, only in {"fmt": "e4m3", "activation_scheme": "dynamic"}.items():
        if raw.get(key, only) != only:
            raise ConfigError(f"{raw[key]!r} is not implemented, only {only!r}", f"quantization_config.{key}")
    lists = {"modules_to_not_convert", "ignored_layers", "dequantize", "scale_fmt"}
    _check_keys(raw, {"quant_method", "weight_block_size", "fmt", "activation_scheme"} | lists, "quantization_config")


def to_json(config: ModelConfig, family: str, dtype: str, stop_ids: Sequence[int] = ()) -> dict[str, Any]:
    """Return the content of a config.json for this model, in the format of `family`.

    dtype      name of the dtype of the saved tensors
    stop_ids   tokens that end a text
    """
    stop: dict[str, Any] = {_STOP: stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)} if stop_ids else {}
    if family == OWN:
        return {"model_type": OWN, "dtype": dtype} | stop | config.to_mapping()
    architecture = {
        "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
        "qwen3_5_text": "Qwen3_5ForCausalLM",
        "qwen3_next": "Qwen3NextForCausalLM",
    }[family]
    names = {letter: name for name, letter in _LAYER_TYPES.items()}
    sizes = sorted(_SIZES | ({"intermediate_size"} if family == "qwen3_5_text" else _MOE_SIZES))
    return {
        "architectures": [architecture],
        "model_type": family,
        "dtype": dtype,
        **stop,
        **{key: getattr(config, key) for key in sizes},
        "num_hidden_layers": config.num_layers,
        "layer_types": [names[kind] for kind in config.layer_pattern],
        "hidden_act": "silu",
        "attention_bias": False,
        **({"norm_topk_prob": True, "decoder_sparse_step": 1} if family == "qwen3_next" else {}),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.partial_rotary_factor,
        },
        "tie_word_embeddings": config.tie_word_embeddings,
        **({"mtp_num_hidden_layers": config.num_mtp_layers} if config.num_mtp_layers else {}),
    }


def family_of(config: ModelConfig) -> str:
    """Return the model family whose format `save_pretrained` uses if its caller names no family."""
    if "M" in config.layer_pattern:
        return OWN
    return "qwen3_5_moe_text" if config.num_experts else "qwen3_5_text"
