"""The commands that load a model: what they print, and one line for what they cannot do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_moe_ref import HybridMoE, preset
from hybrid_moe_ref.__main__ import main

CONFIG = replace(preset("tiny"), num_experts=8, num_experts_per_tok=2, vocab_size=64, num_mtp_layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(0).save_pretrained(path)
    return path


def test_generate_prints_the_greedy_tokens(folder: Path, capsys: pytest.CaptureFixture) -> None:
    want = HybridMoE.from_pretrained(folder).generate(torch.tensor([[5, 6, 7]]), 9)[0].tolist()
    for extra in ([], ["--prefill-chunk", "2"], ["--drafts", "2"]):
        assert main(["generate", str(folder), "--tokens", "5,6,7", "--max-new-tokens", "9", *extra]) == 0
        assert [int(token) for token in capsys.readouterr().out.split()] == want


def test_every_layout_generates_the_tokens_of_one_process(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(1).save_pretrained(tmp_path)
    told = []
    for layout, drafts in (("single", "0"), ("dp8ep8", "2"), ("tp8", "0")):
        command = ["generate", str(tmp_path), "--tokens", "5,6,7", "--max-new-tokens", "5", "--layout", layout]
        assert main([*command, "--drafts", drafts]) == 0, layout
        told.append(capfd.readouterr().out.split())
    assert told[0] == told[1] == told[2] and len(told[0]) == 5


def test_generate_decodes_text_with_the_folders_tokenizer(folder: Path, tmp_path: Path, capsys) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(64)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    want = HybridMoE.from_pretrained(folder).generate(torch.tensor([[5, 6]]), 4)[0].tolist()
    assert main(["generate", str(tmp_path), "--prompt", "w5 w6", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.split() == [f"w{token}" for token in want]


def test_check_describes_the_checkpoint(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["layer_pattern"] == "GGGAMGGA" and answer["dtype"] == "float64" and answer["mtp_layers"] == 1
    assert answer["finite"] and answer["transformers"].startswith("not compared")


def test_check_compares_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    config = replace(CONFIG, layer_pattern="GGA", num_mtp_layers=0)
    HybridMoE(config, device="meta").init_weights(0).save_pretrained(tmp_path)
    assert main(["check", str(tmp_path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["agrees"] and answer["relative_error"] < 5e-5


def test_bench_measures(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", str(folder), "--prompt-tokens", "20", "--new-tokens", "2", "--batch", "2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prefill_ms"] > 0 and answer["decode_ms"] > 0 and answer["peak_rss_mib"] > 100
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["generate", "nowhere", "--tokens", "1"], "'nowhere' is neither a folder nor a preset"),
        (["generate", "FOLDER", "--tokens", "64"], "token id 64 is outside the vocabulary of 64"),
        (
            ["generate", "FOLDER", "--tokens", "1", "--layout", "tp8", "--prefill-chunk", "1"],
            "needs the layout 'single'",
        ),
        (["generate", "tiny", "--tokens", "1", "--layout", "dp8ep8", "--drafts", "1"], "the model has no MTP layer"),
        (["generate", "FOLDER", "--tokens", "64", "--layout", "dp8ep8"], "token id 64 is outside the vocabulary"),
        (["generate", "FOLDER", "--prompt", "x"], "tokenizer.json is not there: give token ids with --tokens"),
        (["generate", "FOLDER", "--tokens", "1", "--drafts", "-1"], "num_drafts: -1 is less than 1"),
        (["generate", "tiny", "--tokens", "1", "--drafts", "1"], "the model has no MTP layer"),
        (["generate", "qwen3.5-397b-a17b", "--tokens", "1"], "the model needs 16"),
        (["generate", "FOLDER", "--tokens", "1", "--device", "cuda:77"], "device cuda:77 cannot compute"),
        (["check", "nowhere"], "nowhere/config.json: no such file"),
        (["bench", "/"], "/ has no config.json"),
    ],
)
def test_errors_are_one_line_and_exit_2(args: list[str], text: str, folder: Path, capsys) -> None:
    assert main([str(folder) if arg == "FOLDER" else arg for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == 1
