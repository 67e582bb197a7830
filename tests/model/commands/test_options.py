"""Options of the commands that load a model: how they are written, and what cannot fit is known before it starts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hybrid_moe_kernels import registry

from hybrid_moe_ref import HybridCache, HybridMoE, memory, preset
from hybrid_moe_ref.__main__ import main
from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.commands import params
from hybrid_moe_ref.config import ConfigError, ParallelConfig
from hybrid_moe_ref.engine import local
from repro.lab.settings import RunSettings
from repro.lab.start.memory import shortage_of

CONFIG = replace(preset("tiny"), num_experts=8, num_experts_per_tok=2, vocab_size=64, num_mtp_layers=1)


@pytest.mark.parametrize(
    ("options", "parallel"),
    [
        (["--dp", "2"], ParallelConfig(2, 1, True)),
        (["--tp", "4"], ParallelConfig(1, 4, False)),
        (["--dp", "2", "--tp", "2"], ParallelConfig(2, 2, True)),
        (["--dp", "2", "--no-ep"], ParallelConfig(2, 1, False)),
        (["--tp", "2", "--ep"], ParallelConfig(1, 2, True)),
        (["--layout", "dp8ep8"], ParallelConfig(8, 1, True)),
        (["--layout", "tp8"], ParallelConfig(1, 8, False)),
    ],
)
def test_ranks_are_asked_for_by_number_or_by_name(monkeypatch, options: list[str], parallel: ParallelConfig) -> None:
    servers = []
    monkeypatch.setattr(local, "generate", lambda server, *args: servers.append(server))
    assert main(["generate", "tiny", "--tokens", "1,2,3", "--prefill-chunk", "2", *options]) == 0
    assert servers[0].parallel == parallel and servers[0].engine.max_num_batched_tokens == 2


def test_ranks_inherit_the_kernels_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(registry, "use", chosen.append)
    monkeypatch.setattr(local, "generate", lambda *args: chosen.append("ranks"))
    assert main(["generate", "tiny", "--tokens", "1", "--dp", "2", "--kernels", "native"]) == 0
    assert chosen == ["native", "ranks"]


@pytest.mark.parametrize(("layout", "tp_size"), [("dp8ep8", 1), ("tp8", 8)])
def test_a_layout_has_the_pages_of_its_ranks(
    layout: str, tp_size: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A tp rank's page holds fewer tokens than the whole model's."""
    servers = []
    monkeypatch.setattr(local, "generate", lambda server, *args: servers.append(server))
    assert main(["generate", "tiny", "--tokens", "1", "--max-new-tokens", "200", "--layout", layout]) == 0
    assert servers[0].engine.num_pages == page_layout(preset("tiny"), 4, tp_size=tp_size).pages_for(201)


def test_a_run_that_cannot_fit_is_known_before_it_starts() -> None:
    def shortage(**changes: object) -> str:
        return shortage_of(RunSettings.from_document(changes, {"scenario": "any", "variant": "control"}, ""))

    assert shortage() == shortage(tp_size=8) == ""
    assert "the model needs 3924.5 GB on 8 ranks" in shortage(model={"hidden_size": 10**6})
    assert "and its cache 393.2 GB" in shortage(engine={"num_pages": 10**6})


def test_a_layout_on_gpus_needs_one(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["generate", "tiny", "--tokens", "1", "--layout", "tp8", "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no GPU on this machine" in capsys.readouterr().err


def test_running_out_of_memory_is_one_line_and_other_errors_are_not(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(args: object) -> int:
        return torch.zeros(1 << 40, 1 << 20) is None

    monkeypatch.setattr(params, "run", allocate)
    assert main(["params", "tiny"]) == 2
    err = capsys.readouterr().err
    assert "DefaultCPUAllocator: can't allocate memory" in err and err.count("\n") == 1
    monkeypatch.setattr(params, "run", lambda args: HybridCache(preset("tiny"), 5).allocate() is None)
    assert main(["params", "tiny"]) == 2
    assert capsys.readouterr().err == "hybrid_moe_ref: a new sequence needs 6 pages, but only 5 are free\n"


@pytest.mark.parametrize("failure", [ValueError, RuntimeError, KeyError])
def test_a_failure_of_ours_is_an_internal_error_with_its_place(failure, capsys, monkeypatch) -> None:
    def fail(args: object) -> int:
        raise failure("no such\nthing")

    monkeypatch.setattr(params, "run", fail)
    monkeypatch.delenv("HMR_DEBUG", raising=False)
    assert main(["params", "tiny"]) == 125
    err = capsys.readouterr().err
    assert err.startswith("hybrid_moe_ref: internal error at commands/test_options.py:") and err.count("\n") == 1
    assert failure.__name__ in err and "set HMR_DEBUG=1 for the traceback" in err
    monkeypatch.setenv("HMR_DEBUG", "1")
    assert main(["params", "tiny"]) == 125
    assert "Traceback" in (err := capsys.readouterr().err) and "in fail" in err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--drafts", "-1"], "argument --drafts: -1 is less than 0"),
        (["--max-new-tokens", "99999999999999999999"], "is over 4611686018427387904"),
        (["--tokens", "1,99999999999999999999"], "argument --tokens: 99999999999999999999 is not a token id"),
        (["--dtype", "bf17"], "invalid choice: 'bf17' (choose from float32 (fp32), float64 (fp64), bfloat16 (bf16)"),
        (
            ["--layout", "dp2"],
            "invalid choice: 'dp2' (choose from single, dp8ep8, tp8; for other numbers of ranks give",
        ),
        (["--tokens", ""], "argument --tokens: the list is empty; give at least one token id"),
    ],
)
def test_bad_options_are_one_line(options: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "tiny", *([] if "--tokens" in options else ["--tokens", "1"]), *options])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and text in err and err.count("\n") == 1


def test_active_parameters_are_shown_with_what_they_leave_out(capsys) -> None:
    assert main(["params", "qwen3.5-397b-a17b"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["active"].endswith("(16.33 B, without the embedding table)")
    assert lines["active_with_embedding"].endswith("(17.35 B)")


def test_a_container_that_may_use_less_than_the_machine_has_counts(tmp_path: Path, monkeypatch) -> None:
    inner = tmp_path / "pods" / "mine"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (tmp_path / "pods" / "memory.max").write_text("1000000\n")
    (tmp_path / "cgroup").write_text("3:cpu:/\n0::/pods/mine\n")
    assert memory.container_limit(tmp_path, tmp_path / "cgroup") == 1_000_000
    assert memory.container_limit(tmp_path, tmp_path / "absent") == float("inf")
    monkeypatch.setattr(memory, "container_limit", lambda: 1e6)
    with pytest.raises(ConfigError, match=r"the model needs .* GB, this container can use 0.0 GB; less of it"):
        memory.check_memory(HybridMoE(CONFIG, device="meta"), 1, "cpu", suggestion="; less of it")


@pytest.mark.parametrize("argv", ["params tiny", "bench tiny", "generate tiny --tokens 1"])
def test_without_torch_a_command_names_it_in_one_line(argv):
    hidden = "import sys; sys.modules['torch'] = None; from hybrid_moe_ref.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", hidden, *argv.split()], capture_output=True, text=True)
    line = "hybrid_moe_ref: torch is not installed: pip install torch numpy safetensors\n"
    assert (done.returncode, done.stderr) == (125, line)
