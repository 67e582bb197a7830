"""The commands that load a model: what they print, and one line for what they cannot do."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hybrid_moe_ref import HybridCache, HybridMoE, commands, preset
from hybrid_moe_ref.__main__ import main
from hybrid_moe_ref.commands import _show_text
from hybrid_moe_ref.comparison import judge
from hybrid_moe_ref.engine import local
from hybrid_moe_ref.pages import page_layout
from repro.memory import shortage_of
from repro.settings import RunSettings

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


@pytest.mark.parametrize(("layout", "drafts"), [("dp8ep8", "2"), pytest.param("tp8", "0", marks=pytest.mark.full)])
def test_a_layout_generates_the_tokens_of_one_process(tmp_path: Path, capfd, layout: str, drafts: str) -> None:
    HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(1).save_pretrained(tmp_path)
    told = []
    for flags in (("--layout", "single"), ("--layout", layout, "--drafts", drafts)):
        assert main(["generate", str(tmp_path), "--tokens", "5,6,7", "--max-new-tokens", "5", *flags]) == 0, layout
        told.append(capfd.readouterr().out.split())
    assert told[0] == told[1] and len(told[0]) == 5


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


def test_a_character_of_several_tokens_is_printed_whole(capsys) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = "a é 漢 🙂 z"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) > len(text)
    show, shown = partial(_show_text, tokenizer, len(ids), [], []), []
    for token in ids:
        show(token)
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == text and shown[2] == "" and shown[3] == "é"
    show = partial(_show_text, tokenizer, len(ids) - 4, [], [])
    for token in ids[:-4]:  # ends inside a character: what there is of it comes with the last token
        show(token)
    assert capsys.readouterr().out == "a é 漢 \ufffd"


def test_check_describes_the_checkpoint(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(folder), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["layer_pattern"] == "GGGAMGGA" and answer["dtype"] == "float64" and answer["mtp_layers"] == 1
    assert answer["finite"] and answer["transformers"].startswith("not compared")
    assert answer["family"] == "hybrid_moe_ref" and answer["files"] == ["model.safetensors"]
    assert answer["quantisation"] == "none" and answer["skipped"] == {}


def checked(folder: Path, capsys: pytest.CaptureFixture, *options: str) -> tuple[int, dict]:
    status = main(["check", str(folder), "--json", *options])
    return status, json.loads(capsys.readouterr().out)


SMALL = replace(CONFIG, layer_pattern="GGA", num_mtp_layers=0, moe_intermediate_size=10)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_check_compares_with_transformers(tmp_path: Path, capsys: pytest.CaptureFixture, dtype: str) -> None:
    """In sizes and types that transformers' default way to compute experts does not take."""
    pytest.importorskip("transformers")
    model = HybridMoE(SMALL, device="meta", dtype=getattr(torch, dtype)).init_weights(0)
    model.save_pretrained(tmp_path)
    status, answer = checked(tmp_path, capsys)
    assert status == 0 and answer["agrees"]
    if dtype == "bfloat16":
        assert 0 < answer["error_to_float32"] <= 1.5 * answer["their_error_to_float32"]
    else:
        assert answer["tokens"] == 260 and answer["largest_error"] < 5e-5


def test_check_fails_where_the_logits_differ(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    HybridMoE(SMALL, device="meta").init_weights(0).save_pretrained(tmp_path)
    whole = HybridMoE.logits
    monkeypatch.setattr(HybridMoE, "logits", lambda self, hidden: whole(self, hidden * 1.05))
    for dtype in ("float32", "bfloat16"):
        status, answer = checked(tmp_path, capsys, "--dtype", dtype)
        assert status == 1 and answer["agrees"] is False, answer


def test_what_transformers_cannot_load_is_not_compared(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")

    def fail(*args: object, **options: object) -> None:
        raise ImportError("Loading an FP8 model requires accelerate\nand more")

    HybridMoE(SMALL, device="meta").init_weights(0).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    status, answer = checked(tmp_path, capsys)
    assert status == 0 and "agrees" not in answer
    assert answer["transformers"] == "not compared: ImportError: Loading an FP8 model requires accelerate"


def test_only_ties_between_experts_excuse_a_token() -> None:
    truth = torch.randn(4, 65, 7, generator=torch.Generator().manual_seed(0))
    ours, margins = truth.clone(), torch.ones(4, 65)
    assert judge(ours, truth, margins)["agrees"]
    ours[1, 5] *= 1.01
    assert not judge(ours, truth, margins)["agrees"]
    margins[1, 5] = 1e-6
    assert judge(ours, truth, margins) | {"largest_error": 0} == {
        "largest_error": 0, "tokens_apart": 1, "tokens_excused": 1, "tokens_settled": 200, "tokens": 260, "agrees": True
    }  # fmt: skip
    ours[1, 6] = 0
    assert judge(ours, truth, margins)["agrees"], "it reads what the token before it left"
    ours[1, 4] = 0
    assert not judge(ours, truth, margins)["agrees"], "it comes before the tie"
    margins[:, 4] = 0
    assert not judge(ours, truth, margins)["agrees"], "too few tokens stand before a tie"
    assert not judge(truth * torch.nan, truth, margins)["agrees"]


@pytest.mark.parametrize(("layout", "tp_size"), [("dp8ep8", 1), ("tp8", 8)])
def test_a_layout_has_the_pages_of_its_ranks(
    layout: str, tp_size: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A tp rank's page holds fewer tokens than the whole model's."""
    servers = []
    monkeypatch.setattr(local, "generate", lambda server, *args: servers.append(server))
    assert main(["generate", "tiny", "--tokens", "1", "--max-new-tokens", "200", "--layout", layout]) == 0
    assert servers[0].engine.num_pages == page_layout(preset("tiny"), 4, tp_size=tp_size).pages_for(201)


@pytest.mark.full
def test_a_long_prompt_on_tp_ranks(capfd: pytest.CaptureFixture) -> None:
    prompt = ",".join(["1"] * 190)
    assert main(["generate", "tiny", "--tokens", prompt, "--max-new-tokens", "10", "--layout", "tp8"]) == 0
    assert len(capfd.readouterr().out.split()) == 10


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
        (
            ["generate", "tiny", "--tokens", "1", "--max-new-tokens", "100000000000"],
            "GB and its cache 102400.0 GB, this machine has",
        ),
        (
            ["generate", "qwen3.5-397b-a17b", "--tokens", "1", "--layout", "dp8ep8"],
            "the model needs 1859.8 GB on 8 ranks",
        ),
        (["generate", "tiny", "--tokens", "1", "--layout", "tp8", "--kernels", "torch"], "--kernels: needs the layout"),
        (
            ["generate", "tiny", "--tokens", "1", "--drafts", "1", "--prefill-chunk", "2"],
            "--prefill-chunk: 2 cannot be",
        ),
        (["generate", "tiny", "--tokens", "1", "--mode", "graphs"], "--mode: is for ranks, the layout is 'single'"),
        (["generate", "tiny", "--tokens", "1", "--checks", "agree"], "--checks: is for ranks"),
        (["generate", "tiny", "--tokens", "1", "--allow-unsafe"], "--allow-unsafe: is for ranks"),
        (["generate", "tiny", "--tokens", "1", "--layout", "tp8", "--device", "xpu"], "'xpu' is not 'cpu' or 'cuda'"),
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


def test_a_run_that_cannot_fit_is_known_before_it_starts() -> None:
    def shortage(**changes: object) -> str:
        return shortage_of(RunSettings.from_document(changes, {"scenario": "any", "variant": "control"}, ""))

    assert shortage() == shortage(tp_size=8) == ""
    assert "the model needs 3924.5 GB on 8 ranks" in shortage(model={"hidden_size": 10**6})
    assert "and its cache 393.2 GB" in shortage(engine={"num_pages": 10**6})


def test_a_layout_on_gpus_needs_one(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["generate", "tiny", "--tokens", "1", "--layout", "tp8", "--device", "cuda"]) == 2
    assert "--device: 'cuda', but this machine has 0 GPUs" in capsys.readouterr().err


def test_running_out_of_memory_is_one_line_and_other_errors_are_not(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(args: object) -> int:
        return torch.zeros(1 << 40, 1 << 20) is None

    monkeypatch.setattr(commands, "params", allocate)
    assert main(["params", "tiny"]) == 2
    err = capsys.readouterr().err
    assert "DefaultCPUAllocator: can't allocate memory" in err and err.count("\n") == 1
    monkeypatch.setattr(commands, "params", lambda args: HybridCache(preset("tiny"), 5).allocate() is None)
    assert main(["params", "tiny"]) == 2
    assert capsys.readouterr().err == "hybrid_moe_ref: a new sequence needs 6 pages, 5 are free\n"
    monkeypatch.setattr(commands, "params", lambda args: torch.zeros(2) @ torch.zeros(3) is None)
    with pytest.raises(RuntimeError, match="size"):
        main(["params", "tiny"])
