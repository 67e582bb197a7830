"""The commands that load a model: what they print, and one line for what they cannot do."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hybrid_moe_ref import HybridMoE, preset
from hybrid_moe_ref.__main__ import main
from hybrid_moe_ref.commands.comparison import judge_exact, judge_rounding
from hybrid_moe_ref.commands.generate import MAX_RANKS
from hybrid_moe_ref.commands.output import TextPrinter

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


@pytest.mark.full  # on two ranks below, with --dp and --tp
@pytest.mark.parametrize(("layout", "drafts"), [("dp8ep8", "2"), ("tp8", "0")])
def test_a_layout_generates_the_tokens_of_one_process(tmp_path: Path, capfd, layout: str, drafts: str) -> None:
    HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(1).save_pretrained(tmp_path)
    lines = []
    for flags in (("--layout", "single"), ("--layout", layout, "--drafts", drafts)):
        assert main(["generate", str(tmp_path), "--tokens", "5,6,7", "--max-new-tokens", "5", *flags]) == 0, layout
        lines.append(capfd.readouterr().out.split())
    assert lines[0] == lines[1] and len(lines[0]) == 5


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


def test_a_tokenizer_that_is_missing_is_one_line(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{")
    args = ["generate", str(tmp_path), "--prompt", "x"]
    if importlib.util.find_spec("tokenizers"):
        assert main(args) == 2
        assert (
            f"hybrid_moe_ref: {tmp_path}/tokenizer.json: " in (err := capsys.readouterr().err) and err.count("\n") == 1
        )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(args) == 2
    assert "--prompt: the package tokenizers is not installed: pip install tokenizers, or" in capsys.readouterr().err


def test_a_character_of_several_tokens_is_printed_whole(capsys) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    text = "a é 漢 🙂 z"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) > len(text)
    printer, shown = TextPrinter(tokenizer), []
    for token in ids:
        printer.show(token)
        shown.append(capsys.readouterr().out)
    assert "".join(shown) == text and shown[2] == "" and shown[3] == "é"
    printer = TextPrinter(tokenizer)
    for token in ids[:-4]:  # ends inside a character: what there is of it comes at the end
        printer.show(token)
    printer.end()
    assert capsys.readouterr().out == "a é 漢 \ufffd\n"


def checked(folder: Path, capsys: pytest.CaptureFixture, *options: str) -> tuple[int, dict]:
    status = main(["check", str(folder), "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_check_describes_the_checkpoint(folder: Path, capsys: pytest.CaptureFixture) -> None:
    status, answer = checked(folder, capsys, "--load-only")
    assert status == 0 and "not_compared" not in answer
    assert answer["layer_pattern"] == "GGGAMGGA" and answer["dtype"] == "float64" and answer["mtp_layers"] == 1
    assert answer["family"] == "hybrid_moe_ref" and answer["files"] == ["model.safetensors"]
    assert answer["quantisation"] == "none" and answer["skipped"] == {} and answer["finite"]


SMALL = replace(CONFIG, layer_pattern="GGA", num_mtp_layers=0, moe_intermediate_size=10)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_check_compares_with_transformers_in_float64(tmp_path: Path, capsys, dtype: str) -> None:
    """In sizes and types that transformers' default way to compute experts does not take."""
    pytest.importorskip("transformers")
    model = HybridMoE(SMALL, device="meta", dtype=getattr(torch, dtype)).init_weights(0)
    model.save_pretrained(tmp_path)
    status, answer = checked(tmp_path, capsys)
    assert status == 0 and answer["agrees"], answer
    assert answer["tokens"] == 260 and answer["largest_error_in_float64"] < 1e-11
    assert ("median_error" in answer) == (dtype != "float64")


def test_check_fails_where_the_logits_differ(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as little as float32 would not show, and where only the narrower dtype is wrong."""
    pytest.importorskip("transformers")
    HybridMoE(SMALL, device="meta").init_weights(0).save_pretrained(tmp_path)
    whole = HybridMoE.logits

    def off(dtype: torch.dtype, by: float) -> None:
        change = {dtype: 1 + by}
        monkeypatch.setattr(
            HybridMoE, "logits", lambda self, hidden: whole(self, hidden * change.get(hidden.dtype, 1.0))
        )

    for dtype, by in ((torch.float64, 1e-9), (torch.bfloat16, 0.05)):
        off(dtype, by)
        status, answer = checked(tmp_path, capsys, "--dtype", "bf16")
        assert status == 1 and answer["agrees"] is False, answer


def test_check_exits_with_1_where_it_could_not_compare(
    folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")

    def fail(*args: object, **options: object) -> None:
        raise ImportError("Loading an FP8 model requires accelerate\nand more")

    HybridMoE(SMALL, device="meta").init_weights(0).save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    status, answer = checked(tmp_path, capsys)
    assert status == 1 and "agrees" not in answer
    assert answer["not_compared"] == "transformers: ImportError: Loading an FP8 model requires accelerate"
    status, answer = checked(folder, capsys)
    assert (status, answer["not_compared"]) == (1, "no other implementation has this stack of layers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, answer = checked(tmp_path, capsys)
    assert (status, answer["not_compared"]) == (1, "transformers is not installed (pip install transformers)")


def test_one_token_that_differs_is_no_agreement() -> None:
    truth = torch.randn(4, 65, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours = truth.clone()
    assert judge_exact(ours, truth)["agrees"] and judge_rounding(ours, truth, truth)["agrees"]
    ours[1, 5] *= 1 + 2e-11
    assert not judge_exact(ours, truth)["agrees"]
    assert not judge_exact(truth * torch.nan, truth)["agrees"]
    assert not judge_rounding(truth * torch.nan, truth, truth)["agrees"]


def test_generation_stops_at_the_end_of_the_text(folder: Path, tmp_path: Path, capsys) -> None:
    """In one process, with drafts and on ranks; generation_config.json counts more than config.json."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = HybridMoE.from_pretrained(folder).generate(torch.tensor([[5, 6, 7]]), 9)[0].tolist()
    stop = next(token for token in whole[3:] if whole.index(token) >= 3)
    until, config = whole[: whole.index(stop) + 1], json.loads((tmp_path / "config.json").read_text())

    def generated(*options: str) -> list[int]:
        args = ["generate", str(tmp_path), "--tokens", "5,6,7", "--max-new-tokens", "9", *options]
        assert main(args) == 0
        return [int(token) for token in capsys.readouterr().out.split()]

    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": stop}))
    assert generated() == generated("--drafts", "2") == until != whole
    assert generated("--ignore-eos") == generated("--drafts", "2", "--ignore-eos") == whole
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [63, whole[0]]}))
    assert generated() == whole[:1]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert generated() == until
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    assert main(["generate", str(tmp_path), "--tokens", "1"]) == 2
    assert (
        "generation_config.json: eos_token_id: must be an id or a list of ids, not ['</s>']" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("options", "num_ranks"), [(["--dp", "2", "--drafts", "2"], 2), (["--tp", "2"], 2)])
def test_ranks_stop_at_the_end_of_the_text_too(tmp_path: Path, capfd, options: list[str], num_ranks: int) -> None:
    model = HybridMoE(CONFIG, device="meta", dtype=torch.float64).init_weights(1)
    whole = model.generate(torch.tensor([[5, 6, 7]]), 9)[0].tolist()
    stop = next(token for token in whole[3:] if whole.index(token) >= 3)
    model.stop_ids = (stop,)
    model.save_pretrained(tmp_path)
    assert HybridMoE.from_pretrained(tmp_path).stop_ids == (stop,)
    assert main(["generate", str(tmp_path), "--tokens", "5,6,7", "--max-new-tokens", "9", *options]) == 0
    assert [int(token) for token in capfd.readouterr().out.split()] == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize("name", ["bf16", "bfloat16"])
def test_both_spellings_of_a_dtype_are_taken_everywhere(folder: Path, capsys, name: str) -> None:
    assert main(["pages", "tiny", "--kv-dtype", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_dtype"] == "bfloat16"
    assert checked(folder, capsys, "--dtype", name, "--load-only")[1]["dtype"] == "bfloat16"


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
        (["generate", "tiny", "--tokens", "1", "--layout", "dp8ep8", "--drafts", "1"], "the model has no MTP layer"),
        (["generate", "FOLDER", "--tokens", "64", "--layout", "dp8ep8"], "token id 64 is outside the vocabulary"),
        (
            ["generate", "tiny", "--tokens", "1", "--max-new-tokens", "100000000000"],
            "GB in float32 and its cache 102400.0 GB, this machine has",
        ),
        (
            ["generate", "qwen3.5-397b-a17b", "--tokens", "1", "--layout", "dp8ep8"],
            "the model needs 1859.8 GB on 8 ranks in float32",
        ),
        (
            ["generate", "Qwen/Qwen3.5-35B-A3B", "--tokens", "1"],
            "hf download Qwen/Qwen3.5-35B-A3B --local-dir DIR)",
        ),
        (["generate", "tinny", "--tokens", "1"], "qwen3-next-80b-a3b) (did you mean 'tiny'?)"),
        (
            ["generate", "tiny", "--tokens", "1", "--layout", "tp8", "--dp", "2"],
            "--layout: 'tp8' already sets the number of ranks",
        ),
        (
            ["generate", "tiny", "--tokens", "1", "--dp", "100", "--tp", "9"],
            f"ranks are more than {MAX_RANKS}, the most",
        ),
        (["generate", "tiny", "--tokens", "1", "--dp", "3"], "512 experts cannot be divided evenly over 3 ranks"),
        (["generate", "tiny", "--prompt", "x"], "--prompt: the preset 'tiny' has no tokenizer: give token ids with"),
        (
            ["generate", "qwen3.5-397b-a17b", "--tokens", "1"],
            "; a preset's default dtype is float32, --dtype bfloat16 takes",
        ),
        (
            ["generate", "tiny", "--tokens", "1", "--drafts", "1", "--prefill-chunk", "2"],
            "--prefill-chunk: 2 cannot be combined with --drafts in a single process",
        ),
        (
            ["generate", "tiny", "--tokens", "1", "--mode", "graphs"],
            "--mode: has no effect without ranks; add --layout dp8ep8,",
        ),
        (["generate", "tiny", "--tokens", "1", "--checks", "agree"], "--checks: has no effect without ranks"),
        (["generate", "tiny", "--tokens", "1", "--allow-unsafe"], "--allow-unsafe: has no effect without ranks"),
        (["generate", "tiny", "--tokens", "1", "--ep"], "--ep: has no effect on one rank; add --dp N or --tp N"),
        (["generate", "tiny", "--tokens", "1", "--dp", "1", "--no-ep"], "--no-ep: has no effect on one rank"),
        (["generate", "tiny", "--tokens", "1", "--layout", "tp8", "--device", "xpu"], "'xpu' is not 'cpu' or 'cuda'"),
        (["generate", "FOLDER", "--prompt", "x"], "tokenizer.json; give token ids with --tokens"),
        (["generate", "tiny", "--tokens", "1", "--drafts", "1"], "the model has no MTP layer"),
        (["generate", "qwen3.5-397b-a17b", "--tokens", "1"], "the model needs 16"),
        (["generate", "FOLDER", "--tokens", "1", "--device", "cuda:77"], "compute in torch.float64 on device cuda:77"),
        (["check", "nowhere"], "'nowhere': the folder does not exist"),
        (["check", "tiny"], "'tiny': the folder does not exist"),
        (["bench", "/"], "/: the folder has no config.json"),
        (["bench", "tiny", "--device", "meta"], "device meta is not supported: choose cpu or cuda"),
    ],
)
def test_errors_are_one_line_and_exit_2(args: list[str], text: str, folder: Path, capsys) -> None:
    assert main([str(folder) if arg == "FOLDER" else arg for arg in args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == 1
