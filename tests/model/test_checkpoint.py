"""Checkpoints: bit-exact round trips, every format of the families, and bad input named exactly."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybrid_moe_ref import HybridMoE, ModelConfig
from hybrid_moe_ref.checkpoint import CheckpointError, describe, load_weights, read_config, save
from hybrid_moe_ref.config import preset

THREE_WAY = ModelConfig.from_mapping(
    preset("tiny").to_mapping()
    | {"num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64, "mamba_time_step_max": 0.1}
)
QWEN = ModelConfig.from_mapping(THREE_WAY.to_mapping() | {"layer_pattern": "GGGA", "mamba_time_step_max": None})
DENSE = ModelConfig.from_mapping(QWEN.to_mapping() | {"num_experts": 0, "intermediate_size": 48})
TIED = ModelConfig.from_mapping(QWEN.to_mapping() | {"tie_word_embeddings": True})


def build(config: ModelConfig = QWEN, dtype: torch.dtype = torch.float32) -> HybridMoE:
    return HybridMoE(config, device="meta", dtype=dtype).init_weights(seed=2)


def assert_same(a: HybridMoE, b: HybridMoE) -> None:
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert mine.keys() == theirs.keys()
    for name, parameter in mine.items():
        assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize("config", [THREE_WAY, QWEN, DENSE, TIED], ids=["three-way", "qwen", "dense", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_save_and_load_are_bit_exact(config: ModelConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(config, dtype)
    save(model, tmp_path, max_shard_bytes=300_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = HybridMoE.from_pretrained(tmp_path)
    assert_same(model, again)
    assert load_file(next(tmp_path.glob("*.safetensors")))  # the safetensors library reads what we write


def test_qwen3_next_layout_is_bit_exact(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path, family="qwen3_next")
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.0.linear_attn.in_proj_qkvz.weight" in names
    assert "model.layers.0.linear_attn.in_proj_qkv.weight" not in names
    assert_same(model, HybridMoE.from_pretrained(tmp_path))


def test_saving_again_replaces_the_old_checkpoint(folder: Path) -> None:
    model = build(DENSE)
    save(model, folder, max_shard_bytes=100_000)
    assert_same(model, HybridMoE.from_pretrained(folder))
    model.save_pretrained(folder)
    assert_same(model, HybridMoE.from_pretrained(folder))


def test_experts_one_by_one_are_the_stacked_experts(folder: Path) -> None:
    def unstack(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.endswith("experts.gate_up_proj")]:
            base = name.removesuffix(".gate_up_proj")
            gate_up, down = state.pop(name), state.pop(f"{base}.down_proj")
            for e in range(QWEN.num_experts):
                gate, up = gate_up[e].clone().chunk(2)
                state[f"{base}.{e}.gate_proj.weight"] = gate.clone()
                state[f"{base}.{e}.up_proj.weight"] = up.clone()
                state[f"{base}.{e}.down_proj.weight"] = down[e].clone()

    edit_tensors(folder, unstack)
    assert_same(build(), HybridMoE.from_pretrained(folder))


def test_multimodal_prefix_is_read_and_the_vision_part_named(folder: Path, caplog) -> None:
    def prefix(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("model.")]:
            state["model.language_model." + name.removeprefix("model.")] = state.pop(name)
        state["model.visual.blocks.0.norm1.weight"] = torch.ones(3)
        state["model.visual.blocks.1.norm1.weight"] = torch.ones(3)

    edit_tensors(folder, prefix)
    text = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen3_5_moe_text"}
    outer = {"model_type": "qwen3_5_moe", "text_config": text, "vision_config": {"depth": 2}, "image_token_id": 7}
    (folder / "config.json").write_text(json.dumps(outer))
    with caplog.at_level(logging.WARNING):
        assert_same(build(), HybridMoE.from_pretrained(folder, dtype=torch.float32))
    assert "skipped 2 tensors model.visual.*" in caplog.text


def multimodal(folder: Path, text_changes: dict[str, object], **changes: object) -> None:
    """Turn the config into that of a multimodal model around it."""
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "qwen3_5_moe", "text_config": text | text_changes} | changes
    (folder / "config.json").write_text(json.dumps(outer))


@pytest.mark.parametrize(
    ("text_changes", "changes", "words"),
    [
        (
            {"model_type": "qwen3_next"},
            {},
            "text_config.model_type: 'qwen3_next' contradicts model_type 'qwen3_5_moe', whose text is 'qwen3_5_moe_t",
        ),
        (
            {"tie_word_embeddings": False},
            {"tie_word_embeddings": [1]},
            r"tie_word_embeddings: \[1\] contradicts text_config.tie_word_embeddings False",
        ),
    ],
)
def test_a_multimodal_config_that_contradicts_its_text_is_refused(
    folder: Path, text_changes: dict, changes: dict, words: str
) -> None:
    multimodal(folder, text_changes, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_config(folder)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_multimodal_model_is_its_texts(folder: Path, key: str) -> None:
    multimodal(folder, {"dtype": None, key: "bfloat16"})
    assert read_config(folder)[1] == "bfloat16"
    edit_config(folder, dtype="float16")
    assert read_config(folder)[1] == "float16"


@pytest.mark.parametrize("stacked", [True, False])
def test_float8_blocks_are_dequantised(folder: Path, stacked: bool) -> None:
    """Block scales along both dimensions, with sizes that 128 does not divide."""
    config = ModelConfig.from_mapping(QWEN.to_mapping() | {"hidden_size": 136, "moe_intermediate_size": 72})
    model = build(config)
    model.save_pretrained(folder)
    want: dict[str, Tensor] = {}
    r = torch.Generator().manual_seed(0)

    def quantise(state: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.experts.gate_up_proj" if stacked else "model.layers.3.self_attn.q_proj.weight"
        weight = state[name]
        scale = torch.rand(*weight.shape[:-2], -(-weight.shape[-2] // 128), -(-weight.shape[-1] // 128), generator=r)
        state[name] = weight.to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale
        full = state[name].float().clone()
        for i in range(full.shape[-2]):
            for j in range(full.shape[-1]):
                full[..., i, j] *= scale[..., i // 128, j // 128]
        want[name] = full

    edit_tensors(folder, quantise)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    loaded = HybridMoE.from_pretrained(folder)
    for name, full in want.items():
        torch.testing.assert_close(loaded.get_parameter(name), full, rtol=1e-6, atol=0)


def test_a_rank_reads_only_its_experts(folder: Path) -> None:
    whole = build()
    part = HybridMoE(read_config(folder)[0], device="meta")
    for block in part.blocks:
        block.mlp.experts = block.mlp.experts.shard(2, 2)
    shards = load_weights(part, folder)
    for a, b in zip(whole.blocks, part.blocks, strict=True):
        assert torch.equal(a.mlp.experts.gate_up_proj[2:4], b.mlp.experts.gate_up_proj)
        assert torch.equal(a.mlp.experts.down_proj[2:4], b.mlp.experts.down_proj)
    assert shards.bytes_read == sum(p.nbytes for p in part.parameters())


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


@pytest.mark.full
def test_loading_takes_little_more_memory_than_what_is_held(tmp_path: Path) -> None:
    """Of a part too, in both layouts of the checkpoint: what is cut by columns is never there as a whole. Pages of the
    mapped file do not count: the system drops them when it needs the memory."""
    wide = {"num_experts": 64, "hidden_size": 512, "moe_intermediate_size": 64, "vocab_size": 16384}
    model = build(ModelConfig.from_mapping(QWEN.to_mapping() | wide))
    model.save_pretrained(tmp_path)
    assert max(p.nbytes for p in model.parameters()) > 30_000_000
    code = f"""
import re, torch
from test_tensor_parallel import OneOf
from hybrid_moe_ref import HybridMoE
from hybrid_moe_ref.checkpoint.shards import Shards
from hybrid_moe_ref.config import ParallelConfig
from hybrid_moe_ref.model import check_device
from hybrid_moe_ref.parallel.layout import load_part
check_device("cpu", torch.float32)
def held():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
rows, most = Shards.rows, 0
def watched(*args):
    global most
    for row in rows(*args):
        most = max(most, held())
        yield row
        most = max(most, held())
Shards.rows = watched
def extra(load):
    global most
    before = most = held()
    model = load()
    print(most - before - sum(p.nbytes for p in model.parameters()))
    return model
part = extra(lambda: load_part({str(tmp_path)!r}, OneOf(1, 2), ParallelConfig(tp_size=2))[0])
model = extra(lambda: HybridMoE.from_pretrained({str(tmp_path)!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    part, whole = map(int, done.stdout.split())
    # Not below nothing: then it would not be the loading that was measured.
    assert min(part, whole) >= -2_000_000 and max(part, whole) <= 16_000_000, done.stdout


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
        ({"rope_parameters": {"rope_theta": 1.0, "factor": 2}}, "rope_parameters.factor: unknown key with value 2"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type: 'yarn' is not implemented"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor: unknown key with value 4.0"),
        (
            {"rope_scaling": {"rope_theta": 5.0}},
            "rope_parameters.rope_theta: 1.* contradicts rope_scaling.rope_theta 5.0",
        ),
        ({"rope_theta": 5.0}, "rope_theta: 5.0 contradicts rope_parameters.rope_theta 1"),
        ({"partial_rotary_factor": 0.5}, "rotary_factor: 0.5 contradicts rope_parameters.partial_rotary_factor 0.25"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta: 0.0 is not positive and finite"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta: -1.0 is not positive and finite"),
        ({"rms_norm_eps": float("nan")}, r"config\.json:1: NaN is not JSON"),
        (
            {"full_attention_interval": 2},
            "2 means the layers GAGA, but layer_types means GGGA",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method: 'awq' is not implemented",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            r"weight_block_size: \[64, 64\] is not implemented",
        ),
        ({"num_hidden_layers": 5}, "num_hidden_layers: 5 contradicts the 4 layer_types"),
        ({"num_attention_heads": 7}, "num_attention_heads: 7 is not a multiple of num_key_value_heads 2"),
        ({"vocab_size": "64"}, "vocab_size: wanted int, got str '64'"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] is not implemented, only \[\]"),
        ({"layer_types": ["full_attention", "mamba"]}, r"layer_types\[1\]: 'mamba' is not one of"),
        ({"layer_types": [[]]}, r"layer_types\[0\]: \[\] is not one of"),
        ({"tie_word_embeddings": [1]}, r"tie_word_embeddings: wanted bool, got list \[1\]"),
        ({"sliding_window": 4096}, "sliding_window: unknown key with value 4096: not implemented"),
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
        f"{file}: model.layers.9.mlp.gate.weight: not part of this model",
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


@pytest.fixture
def next_with_mtp(tmp_path: Path) -> Path:
    """As released: the config does not know of the layer."""
    config = ModelConfig.from_mapping(QWEN.to_mapping() | {"num_mtp_layers": 1})
    build(config).save_pretrained(tmp_path, family="qwen3_next")
    edit_config(tmp_path, mtp_num_hidden_layers=None)
    return tmp_path


@pytest.mark.parametrize("key", [None, "mtp_num_hidden_layers", "num_nextn_predict_layers"])
def test_a_draft_layer_is_loaded_where_its_tensors_are(next_with_mtp: Path, key: str | None) -> None:
    if key:
        edit_config(next_with_mtp, **{key: 1})
    model = HybridMoE.from_pretrained(next_with_mtp)
    assert model.config.num_mtp_layers == 1 and len(model.draft_blocks) == 1
    assert_same(build(model.config), model)
    assert describe(next_with_mtp, model)["skipped"] == {}


def test_a_draft_layer_that_is_there_in_part_is_one_line(next_with_mtp: Path) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        del state["mtp.fc.weight"], state["mtp.layers.0.self_attn.q_proj.weight"]

    edit_tensors(next_with_mtp, damage)
    with pytest.raises(CheckpointError) as caught:
        HybridMoE.from_pretrained(next_with_mtp)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{next_with_mtp}: the MTP layer is there in part: ") and "\n" not in problem
    assert "without mtp.fc.weight and 1 others; remove mtp.* to load the model without it" in problem


def test_a_draft_layer_with_half_of_its_experts_tensors_is_one_line(next_with_mtp: Path) -> None:
    edit_tensors(next_with_mtp, lambda state: state.pop("mtp.layers.0.mlp.experts.gate_up_proj"))
    with pytest.raises(CheckpointError) as caught:
        HybridMoE.from_pretrained(next_with_mtp)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{next_with_mtp}: the MTP layer is there in part: ") and "\n" not in problem


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({}, "have 2 MTP layers, only 1 is implemented"),
        ({"mtp_num_hidden_layers": 1}, "the config has 1 MTP layers, the tensors mtp.* have 2"),
        ({"mtp_num_hidden_layers": 1, "num_nextn_predict_layers": 2}, "contradicts num_nextn_predict_layers 2"),
    ],
)
def test_other_numbers_of_draft_layers_are_refused(next_with_mtp: Path, said: dict, text: str) -> None:
    edit_tensors(next_with_mtp, lambda state: state.update({"mtp.layers.1.input_layernorm.weight": torch.zeros(3)}))
    edit_config(next_with_mtp, **said)
    with pytest.raises(CheckpointError, match=text):
        HybridMoE.from_pretrained(next_with_mtp)


def test_a_config_may_name_a_draft_layer_that_was_not_saved(
    next_with_mtp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(next_with_mtp, mtp_num_hidden_layers=1)

    def drop(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if name.startswith("mtp.")]:
            del state[name]

    edit_tensors(next_with_mtp, drop)
    for _ in range(2):
        assert HybridMoE.from_pretrained(next_with_mtp).config.num_mtp_layers == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{next_with_mtp}: the config has 1 MTP layers, no tensor is named mtp.*: loaded without"
    ], "one line, however often it is loaded"


def test_a_float8_tensor_without_blocks_is_named(folder: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    edit_tensors(folder, lambda state: state.update({name: state[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=rf"{name}: float8 with shape \[128\]: its blocks need 2 dimensions"):
        HybridMoE.from_pretrained(folder)


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        ({"x": "gone.safetensors"}, "x: there is no file 'gone.safetensors'"),
        ({"x": "../model.safetensors"}, "x: '../model.safetensors' is not the plain name of a file"),
        ({"x": "/etc/passwd"}, "x: '/etc/passwd' is not the plain name of a file"),
        ({"x": 3}, "x: 3 is not the plain name of a file"),
        ({"x": "model.safetensors"}, "x: not in 'model.safetensors', where the index says it is"),
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
        with pytest.raises(ValueError, match=r"\(device cuda, torch\.float32\)"):
            HybridMoE.from_pretrained(folder, device="cuda", dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        HybridMoE.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json:1: Expecting property name"):
        HybridMoE.from_pretrained(folder)


def test_a_config_that_would_fill_the_memory_is_refused_before_it_is_parsed(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"layer_types": [' + b"[]," * 600_000 + b"[]]}")
    with pytest.raises(CheckpointError, match=r"config\.json:1: more values than the 128 MiB that are read would hold"):
        HybridMoE.from_pretrained(folder)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="qwen3_next has no Mamba-2 layers, the model has 1"):
        build(THREE_WAY).save_pretrained(tmp_path, family="qwen3_next")
    with pytest.raises(CheckpointError, match="the model has 8 experts; it cannot be saved as qwen3_5_text"):
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
