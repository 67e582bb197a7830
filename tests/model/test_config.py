"""Configurations refuse what cannot work, in words that name the field and both numbers."""

import json
import subprocess
import sys

import pytest

from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.config import PRESETS, ConfigError, EngineConfig, ModelConfig, ParallelConfig, preset

SMALL = {"layer_pattern": "GA", "vocab_size": 16, "hidden_size": 8}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"layer_pattern": "GAX"}, "layer_pattern: layer 2 is 'X', not one of G, A, M"),
        ({"layer_pattern": " "}, "layer_pattern: the pattern has no layer"),
        ({"num_attention_heads": 7}, "num_attention_heads: 7 is not a multiple of num_key_value_heads 2"),
        (
            {"linear_num_value_heads": 17},
            "linear_num_value_heads: 17 is not a multiple of linear_num_key_heads 16",
        ),
        ({"num_experts": 4}, "num_experts_per_tok: 10 is more than num_experts 4"),
        ({"hidden_size": 0}, "hidden_size: 0 is less than 1"),
        ({"head_dim": 4}, "partial_rotary_factor: 0.25 of head_dim 4 is 1, but must be an even number"),
        ({"hiden_size": 8}, "hiden_size: unknown key (did you mean 'hidden_size'?)"),
        ({"vocab_size": "16"}, "vocab_size: wanted int, got str '16'"),
        ({"vocab_size": True}, "vocab_size: wanted int, got bool True"),
        ({"rope_theta": None}, "rope_theta: wanted float, got NoneType None"),
        ({"mamba_time_step_max": "x"}, "mamba_time_step_max: wanted float, got str 'x'"),
    ],
)
def test_error_names_the_field_path_and_both_values(change: dict, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_mapping(SMALL | change, where="config.model")
    assert str(caught.value) == f"config.model.{text}"


def test_missing_key_and_wrong_container_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^vocab_size: required, but missing$"):
        ModelConfig.from_mapping({"layer_pattern": "G", "hidden_size": 8})
    with pytest.raises(ConfigError, match=r"^model: wanted a mapping, got list \[\]$"):
        ModelConfig.from_mapping([], where="model")


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'tinny' \(did you mean 'tiny'\?\)"):
        preset("tinny")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


def test_experts_that_do_not_divide_over_the_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ep_size: 512 experts do not divide over 7 ranks \(dp_size 7 x tp_size 1\)"):
        ParallelConfig(dp_size=7).check(preset("tiny"))
    ParallelConfig(dp_size=4, tp_size=2).check(preset("tiny"))


def test_engine_config_needs_room_for_a_decode_step() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens: 4 is less than max_num_seqs 8"):
        EngineConfig(max_num_batched_tokens=4)
    with pytest.raises(ConfigError, match=r"dtype: unknown dtype 'float23' \(did you mean 'float32'\?\)"):
        EngineConfig(dtype="float23")


@pytest.mark.parametrize(
    ("name", "tp_size", "kv_itemsize", "tokens", "percent"),
    [
        ("qwen3.5-397b-a17b", 1, 2, 2096, 0.58),
        ("qwen3.5-397b-a17b", 2, 2, 2096, 0.58),
        ("qwen3.5-397b-a17b", 4, 2, 1056, None),
        ("qwen3.5-122b-a10b", 1, 2, 2096, 0.58),
        ("qwen3-next-80b-a3b", 1, 2, 1056, 0.76),
        ("qwen3.5-35b-a3b", 1, 2, 1056, 0.76),
        ("qwen3.5-35b-a3b", 1, 1, 2096, 0.00),
    ],
)
def test_pages_have_the_published_sizes(
    name: str, tp_size: int, kv_itemsize: int, tokens: int, percent: float | None
) -> None:
    layout = page_layout(preset(name), kv_itemsize=kv_itemsize, tp_size=tp_size)
    assert layout.tokens == tokens
    assert percent is None or round(100 * layout.padding, 2) == percent


def test_the_pages_command_prints_the_layout(capsys: pytest.CaptureFixture) -> None:
    from hybrid_moe_ref.__main__ import main

    assert main(["pages", "qwen3.5-397b-a17b", "--tp", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["tokens"], answer["padding_percent"], answer["tp"], answer["groups"]) == (2096, 0.58, 2, 4)
    assert main(["pages", "qwen3.5-397b-a17b"]) == 0
    assert "tokens               2096\npadding_percent      0.58\n" in capsys.readouterr().out


def test_state_bytes_of_the_397b_model() -> None:
    layout = page_layout(preset("qwen3.5-397b-a17b"))
    assert (layout.states["G"].conv_bytes, layout.states["G"].ssm_bytes) == (73_728, 4_194_304)
    assert layout.bytes_per_token == 2048
    assert (layout.group_size, len(layout.groups)) == (15, 4)


def test_heads_that_do_not_divide_over_tp_are_refused() -> None:
    with pytest.raises(ConfigError, match="linear_num_value_heads: 64 is neither divisible by tp_size 48"):
        page_layout(preset("qwen3.5-397b-a17b"), tp_size=48)


def test_configuration_does_not_import_torch() -> None:
    code = "import sys, hybrid_moe_ref.config, hybrid_moe_ref.cache.pages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["params", "tinny"], "unknown preset 'tinny' (did you mean 'tiny'?)"),
        (["pages", "tiny", "--kv-dtype", "fp9"], "invalid choice: 'fp9'"),
        (["pages", "tiny", "--tp", "0"], "0 is less than 1"),
        (
            ["pages", "qwen3.5-397b-a17b", "--tp", "3"],
            "linear_num_key_heads: 16 is neither divisible by tp_size 3",
        ),
        (["parms", "tiny"], "invalid choice: 'parms'"),
        ([], "COMMAND"),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(args: list[str], text: str, capsys: pytest.CaptureFixture) -> None:
    from hybrid_moe_ref.__main__ import main

    try:
        code = main(args)
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert text in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("qwen3.5-397b-a17b", 396.35, 16.33),
        ("qwen3.5-122b-a10b", 122.11, 9.01),
        ("qwen3.5-35b-a3b", 34.66, 2.95),
        ("qwen3-next-80b-a3b", 79.67, 3.56),
    ],
)
def test_parameter_totals(name: str, total: float, active: float, capsys: pytest.CaptureFixture) -> None:
    from hybrid_moe_ref.__main__ import main

    assert main(["params", name, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (round(answer["total"] / 1e9, 2), round(answer["active"] / 1e9, 2)) == (total, active)
