"""Checkpoints that cannot be read or saved: one line that names the file, the tensor or the field."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import QWEN, THREE_WAY, build, edit_config, edit_tensors
from torch import Tensor

from hybrid_moe_ref import HybridMoE
from hybrid_moe_ref.checkpoint import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path)
    return tmp_path


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    build(QWEN).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.unlink()
    os.mkfifo(weights)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        HybridMoE.from_pretrained(tmp_path)
    config.unlink()
    config.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"config\.json:0: not a regular file"):
        HybridMoE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "qwen3_nex"}, "model_type: 'qwen3_nex' is not one of"),
        ({"model_type": ["qwen3_next"]}, r"model_type: wanted a string, got \['qwen3_next'\]"),
        ({"model_type": None}, "model_type: wanted a string, got None"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not implemented, only 'silu'"),
        ({"attention_bias": True}, "attention_bias: True is not implemented, only False"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            "rope_parameters.rope_type: 'yarn' is not impl",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "type": "yarn", "rope_theta": 1.0}},
            "rope_parameters.type: 'yarn' is not impl",
        ),
        (
            {"rope_parameters": {"rope_theta": 1.0, "factor": 2}},
            "rope_parameters.factor: the key is not known, and its value 2",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type: 'yarn' is not implemented"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor: the key is not known, and its value 4.0"),
        (
            {"rope_scaling": {"rope_theta": 5.0}},
            "rope_parameters.rope_theta: 1.* contradicts rope_scaling.rope_theta 5.0",
        ),
        ({"rope_theta": 5.0}, "rope_theta: 5.0 contradicts rope_parameters.rope_theta 1"),
        ({"partial_rotary_factor": 0.5}, "rotary_factor: 0.5 contradicts rope_parameters.partial_rotary_factor 0.25"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: 0.0 must be positive and finite"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta: -1.0 must be positive and finite"),
        ({"rms_norm_eps": float("nan")}, r"config\.json:1: NaN is not JSON"),
        (
            {"full_attention_interval": 2},
            "2 gives the layers GAGA, but layer_types gives GGGA",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method: 'awq' is not implemented",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size: \[64, 64\] is not implemented",
        ),
        ({"num_hidden_layers": 5}, "num_hidden_layers: 5 contradicts the number of layer_types, 4"),
        ({"num_attention_heads": 7}, "num_attention_heads: 7 is not a multiple of num_key_value_heads 2"),
        ({"vocab_size": "64"}, "vocab_size: wanted int, got str '64'"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] is not implemented, only \[\]"),
        ({"layer_types": ["full_attention", "mamba"]}, r"layer_types\[1\]: 'mamba' is not one of"),
        ({"layer_types": [[]]}, r"layer_types\[0\]: \[\] is not one of"),
        ({"tie_word_embeddings": [1]}, r"tie_word_embeddings: wanted bool, got list \[1\]"),
        ({"sliding_window": 4096}, "sliding_window: the key is not known, and its value 4096"),
        ({"num_experts": None}, "num_experts: wanted int, got NoneType None"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of"),
        ({"dtype": ["float32"]}, r"dtype: wanted a string, got \['float32'\]"),
    ],
)
def test_config_that_is_not_implemented_is_refused_by_name(folder: Path, changes: dict, text: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=text) as caught:
        HybridMoE.from_pretrained(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_missing_extra_and_misshapen_tensors_are_listed_together(folder: Path) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        del state["model.layers.0.linear_attn.A_log"]
        state["model.layers.9.mlp.gate.weight"] = torch.zeros(1)
        state["model.norm.weight"] = torch.zeros(7)

    edit_tensors(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        HybridMoE.from_pretrained(folder)
    file = folder / "model.safetensors"
    assert caught.value.problems == [
        f"{folder}: model.layers.0.linear_attn.A_log: missing, wanted shape [4]",
        f"{file}: model.norm.weight: shape [7], wanted [128]",
        f"{file}: model.layers.9.mlp.gate.weight: no part of this model uses this tensor",
    ]
    assert str(caught.value).startswith("3 problems:\n")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file_is_named(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        HybridMoE.from_pretrained(folder)


def header_of(*entries: tuple[str, int, int], dtype: str = "F8_E4M3") -> bytes:
    fields = {
        name: {"dtype": dtype, "shape": [end - start], "data_offsets": [start, end]} for name, start, end in entries
    }
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000000000\n",
        b"\xff" * 8 + b"{}",
        b"\2" + bytes(7) + b"\xff\xfe",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        b"\x08" + bytes(7) + b'{"x": 3}',
        header_of(("x", 0, 8), dtype="I4") + bytes(8),
        header_of(("x", 0, 8), dtype="F32") + bytes(8),
        header_of(("x", 0, 8)) + bytes(7),
        header_of(("x", 0, 8)) + bytes(11),
        header_of(("x", 0, 8), ("y", 4, 12)) + bytes(12),
        header_of(("x", 0, 8), ("y", 10, 12)) + bytes(12),
    ],
    ids=["lfs", "size", "text", "deep", "entry", "dtype", "bytes", "short", "long", "overlap", "gap"],
)
def test_a_file_that_safetensors_refuses_is_one_line_with_its_name_and_size(folder: Path, data: bytes) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        HybridMoE.from_pretrained(folder)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: truncated, corrupt or not a safetensors file ({len(data)} bytes): ")
    assert "\n" not in problem and len(problem) < 300 + len(str(path))


def test_a_weight_of_another_dtype_is_named(folder: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    edit_tensors(folder, lambda state: state.update({name: state[name].to(torch.int64)}))
    with pytest.raises(CheckpointError, match=rf"{name}: dtype I64 is not one of F64, F32, F16, BF16, F8_E4M3"):
        HybridMoE.from_pretrained(folder)


def with_float8(folder: Path, scale: Tensor) -> str:
    name = "model.layers.3.self_attn.q_proj.weight"

    def quantise(state: dict[str, Tensor]) -> None:
        blocks = [-(-size // 128) for size in state[name].shape]
        state[name] = torch.ones_like(state[name]).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()

    edit_tensors(folder, quantise)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "e8"})
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_scales_of_float8_blocks_may_be_powers_of_two(folder: Path, dtype: torch.dtype) -> None:
    name = with_float8(folder, torch.tensor(0.25).to(dtype))
    assert (HybridMoE.from_pretrained(folder).get_parameter(name) == 0.25).all()


def test_scales_of_another_dtype_are_refused_by_it(folder: Path) -> None:
    name = with_float8(folder, torch.tensor(2, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=rf"{name}_scale_inv: scales of dtype U8 are not implemented, only F64"):
        HybridMoE.from_pretrained(folder)


def test_a_float8_tensor_without_blocks_is_named(folder: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    edit_tensors(folder, lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(
        CheckpointError, match=rf"{name}: a float8 tensor needs 2 dimensions for its blocks, but has shape \[128\]"
    ):
        HybridMoE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        ({"x": "gone.safetensors"}, "x: there is no file 'gone.safetensors'"),
        ({"x": "../model.safetensors"}, "x: '../model.safetensors' is not the plain name of a file"),
        ({"x": "/etc/passwd"}, "x: '/etc/passwd' is not the plain name of a file"),
        ({"x": 3}, "x: 3 is not the plain name of a file"),
        ({"x": "model.safetensors"}, "x: the tensor is not in 'model.safetensors', where the index says it is"),
        ([], "weight_map is not a mapping"),
    ],
)
def test_bad_index_is_named(folder: Path, weight_map: object, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=text):
        HybridMoE.from_pretrained(folder)


def test_absent_folder_files_devices_and_dtypes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: no such file"):
        HybridMoE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dtype torch\.int8 is not one of float32"):
        HybridMoE.from_pretrained(folder, dtype=torch.int8)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"cannot compute in torch\.float32 on device cuda: "):
            HybridMoE.from_pretrained(folder, device="cuda", dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        HybridMoE.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json:1: Expecting property name"):
        HybridMoE.from_pretrained(folder)


def test_a_config_that_would_fill_the_memory_is_refused_before_it_is_parsed(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"layer_types": [' + b"[]," * 600_000 + b"[]]}")
    with pytest.raises(CheckpointError, match=r"config\.json:1: the values would take more than 128 MiB"):
        HybridMoE.from_pretrained(folder)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qwen3_next has no Mamba-2 layers, but the model has 1"):
        build(THREE_WAY).save_pretrained(tmp_path, family="qwen3_next")
    with pytest.raises(CheckpointError, match="the model has 8 experts, so it cannot be saved as qwen3_5_text"):
        build().save_pretrained(tmp_path, family="qwen3_5_text")
    with pytest.raises(CheckpointError, match=r"family 'qwen3_nxt' is not one of .*did you mean 'qwen3_next'"):
        build().save_pretrained(tmp_path, family="qwen3_nxt")
    with pytest.raises(CheckpointError, match="on the meta device"):
        HybridMoE(QWEN, device="meta").save_pretrained(tmp_path)
    sharded = build()
    sharded.blocks[0].mlp.experts = sharded.blocks[0].mlp.experts.shard(0, 4)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.experts holds 4 of 8 experts"):
        sharded.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
