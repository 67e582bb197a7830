"""Checkpoints: bit-exact round trips, every format of the families, and bad input named exactly."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import DENSE, QWEN, THREE_WAY, TIED, assert_same, build, edit_config, edit_tensors
from safetensors.torch import load_file
from torch import Tensor

from hybrid_moe_ref import HybridMoE, ModelConfig
from hybrid_moe_ref.checkpoint import CheckpointError, describe, load_weights, read_config, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path)
    return tmp_path


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
            "model_type: 'qwen3_next' contradicts model_type 'qwen3_5_moe', whose text model is 'qwen3_5_moe_t",
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
from cut_models import OneOf
from hybrid_moe_ref import HybridMoE
from hybrid_moe_ref.checkpoint.shards import Shards
from hybrid_moe_ref.config import ParallelConfig
from hybrid_moe_ref.model import check_device
from hybrid_moe_ref.parallel.sharding.layout import load_part
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
    assert problem.startswith(f"{next_with_mtp}: the MTP layer is incomplete: ") and "\n" not in problem
    assert (
        "without mtp.fc.weight and 1 others; remove all tensors mtp.* to load the model without this layer" in problem
    )


def test_a_draft_layer_with_half_of_its_experts_tensors_is_one_line(next_with_mtp: Path) -> None:
    edit_tensors(next_with_mtp, lambda state: state.pop("mtp.layers.0.mlp.experts.gate_up_proj"))
    with pytest.raises(CheckpointError) as caught:
        HybridMoE.from_pretrained(next_with_mtp)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{next_with_mtp}: the MTP layer is incomplete: ") and "\n" not in problem


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({}, "are for 2 MTP layers, but only 1 is implemented"),
        ({"mtp_num_hidden_layers": 1}, "the config has 1 MTP layers, but there are tensors mtp.* for 2"),
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
        f"{next_with_mtp}: the config has 1 MTP layers, but no tensor is named mtp.*: the model is loaded without them"
    ], "one line, however often it is loaded"
