"""The command line: contracts, exit codes, and one clear line for every mistake."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import fails
from rich.console import Console
from rich.live import Live
from scene import Scene

from repro.commands.cli import COMMANDS, main, parser_of
from repro.commands.shared.verdicts import exit_code
from repro.exit_codes import CANNOT_TELL, EXPECTED, UNEXPECTED, USAGE
from repro.lab.rank import worker
from repro.lab.scenarios import settings_of
from repro.lab.settings import RunSettings
from repro.lab.start.prepare import prepare_run_dir
from repro.report.live_table import LiveTable, row_of
from repro.store.run_dir import OutputError
from repro.trace.witness.file import Tail
from repro.verdict import Verdict
from repro.watch.document import describe

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "metadata_rebild"], "unknown scenario 'metadata_rebild' (did you mean 'metadata_rebuild'?)"),
        (["run", "nonsense"], "known: autotune_cache"),
        (["run", "metadata_rebuild", "--variant", "cure"], "invalid choice: 'cure'"),
        (["run", "metadata_rebuild", "--rank", "4"], "unknown argument --rank (did you mean '--ranks'?)"),
        (["run", "metadata_rebuild", "--ranks", "7"], "512 experts do not divide over 7 ranks"),
        (["run", "metadata_rebuild", "--ranks", "1"], "at least 2"),
        (["run", "metadata_rebuild", "--ranks", "eight"], "invalid int value: 'eight'"),
        (["run", "metadata_rebuild", "--quiet-window", "0"], "not a positive number of seconds"),
        (["run", "metadata_rebuild", "--deadline", "nan"], "not a positive number of seconds"),
        (["watch", "/nowhere"], "not a run directory: No such file or directory"),
        ([], "required: COMMAND"),
        (["runn"], "invalid choice: 'runn'"),
        (["watch", "a\nb\x1b[2J"], "repro: a␊b␛[2J/config.json: not a run directory"),
        (["run", "metadata_rebuild", "--seed", "a\nb"], "invalid int value: 'a\\nb'"),
        (["run", "a\nb"], "unknown scenario 'a\\nb'"),
        (["clean", "--out=--"], "'--' is no value for out"),
        (["matrix", "--only=--"], "'--' is no value for only"),
        (["bundle", "/"], "not a run directory"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(capsys, tmp_path, argv, words):
    code, error = fails(capsys, *argv, *(["--out", tmp_path] if argv[:1] == ["run"] else []))
    assert code == USAGE and words in error
    assert not any(tmp_path.iterdir()), "nothing may be left half-written"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"rnks": 4}', "rnks: unknown key"),
        ('{"quiet_windw_s": 4}', "(did you mean 'quiet_window_s'?)"),
        ('{"seed": "four"}', "seed: wanted int, got str 'four'"),
        ('{"model": {"preset": "tinny"}}', "unknown preset 'tinny' (did you mean 'tiny'?)"),
        ('{"model": {"preset": 5}}', "model.preset: wanted str, got 5"),
        ('{"scenario": "idle_skip"}', "the file is for the scenario 'idle_skip'"),
        ('{"seed": NaN}', "NaN is not JSON"),
        ("[" * 200_000, "nested too deep"),
        ('{"engine": {"num_pages": 1}}', "engine.num_pages: 1 is less than"),
        (
            '{"tp_size": 8, "workload": {"max_new_tokens": 288}, "engine": {"num_pages": 80}}',
            "engine.num_pages: 80 is less than 176, the number of pages that 4 sequences of 300 tokens take",
        ),
        (
            '{"num_ranks": 12, "tp_size": 3, "model": {"num_experts": 24}}',
            "model.linear_num_key_heads: 2 is neither divisible by tp_size 3",
        ),
        ('{"model": {"num_expert": 256}}', "model.num_expert: unknown key (did you mean 'num_experts'?)"),
        ('{"model": {"num_experts": true}}', "model.num_experts: wanted int, got bool True"),
        ('{"engine": {"max_num_seqs": 0}}', "engine.max_num_seqs: 0 is less than 1"),
        ('{"engine": 5}', "engine: wanted a mapping, got 5"),
        ('{"workload": {"max_prompt_tokens": 4000}}', "workload.max_prompt_tokens: 4000 is more than"),
        ('{"workload": {"max_requests": 2000000000}}', "workload.max_requests: 2000000000 is more than 1,000,000"),
        ('{"workload": {"max_arrival_step": 2000000000}}', "workload.max_arrival_step: 2000000000 is more than"),
        (
            '{"workload": {"max_requests": 1000000}}',
            "workload: the requests of 8 dp ranks can take 168000064 tokens and steps, but at most",
        ),
        (
            '{"workload": {"max_arrival_step": 1000000}}',
            "workload: the requests of 8 dp ranks can take 8000504 tokens and steps",
        ),
        ('{"engine": {"unfinished_interval": 2000000000}}', "engine.unfinished_interval: 2000000000 is more"),
        ('{"engine": {"collective_limit_s": 1e300}}', "engine.collective_limit_s: 1e+300 is more than 1,000,000"),
        ('{"model": {"hidden_size": 2000000000}}', "model.hidden_size: 2000000000 is more than"),
        ('{"model": {"rope_theta": 1e300}}', "model.rope_theta: 1e+300 is more than 1,000,000,000,000"),
        ('{"model": {"layer_pattern": "' + "G" * 300 + '"}}', "model.layer_pattern: the length 300 is more than 256"),
        ('{"num_ranks": 2000000000}', "num_ranks: 2000000000 is more than 1,024"),
        ('{"seed": 9223372036854775808}', "does not fit into 64 bits"),
        ("[1]", "wanted a mapping"),
        ('{"ring_records": 7}', "ring_records: 7 is not an even number of events in 64.."),
        ('{"seed": 1,\n}', ":2: "),
    ],
)
def test_config_errors_name_file_field_and_value(capsys, tmp_path, text, words):
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text(text)
    code, error = fails(capsys, "run", "metadata_rebuild", "--config", config, "--out", out)
    assert code == USAGE and words in error and not out.exists()


@pytest.mark.full  # a process that imports torch
@pytest.mark.parametrize("command", [["run", "metadata_rebuild", "--variant", "all"], ["matrix"]])
def test_a_model_that_cannot_fit_is_refused_before_a_rank_starts(capsys, tmp_path, command):
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text('{"model": {"hidden_size": 1000000}}')
    code, error = fails(capsys, *command, "--config", config, "--out", out)
    assert code == USAGE and re.search(r"the model needs 3\d{3}\.\d GB on 8 ranks", error) and not out.exists()


def test_more_ranks_than_fit_into_memory_are_refused_before_one_starts(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.get)
    code, line = fails(capsys, "run", "metadata_rebuild", "--ranks", "128", "--out", tmp_path)
    assert code == USAGE and "num_ranks: 128 ranks take at least 6 GB, but this machine has 4" in line
    assert not any(tmp_path.iterdir())


def test_a_missing_config_file_is_named(capsys, tmp_path):
    code, error = fails(capsys, "run", "metadata_rebuild", "--config", tmp_path / "none.json")
    assert code == USAGE and "none.json: cannot read the file: No such file or directory" in error


@pytest.mark.parametrize("argv", [["run", "idle_skip"], ["run", "all"], ["matrix"], ["minimise", "idle_skip"]])
def test_without_torch_what_runs_the_lab_names_it_in_one_line(capsys, tmp_path, monkeypatch, argv):
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    monkeypatch.chdir(tmp_path)
    code, line = fails(capsys, *argv)
    assert (
        code == CANNOT_TELL and "a run needs torch, which is not installed: pip install torch numpy safetensors" in line
    )
    assert not any(tmp_path.iterdir())


def test_a_rank_without_torch_names_it_in_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name, number in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, number)
    assert worker.main(["idle_skip"]) == CANNOT_TELL
    assert capsys.readouterr().err.startswith("repro.worker: a run needs torch, which is not installed")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_nccl_without_gpus_cannot_run_here(capsys, tmp_path):
    code, error = fails(capsys, "run", "metadata_rebuild", "--backend", "nccl", "--out", tmp_path)
    assert code == CANNOT_TELL and "needs a GPU for each of 8 ranks; 0 found" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a b", "it's"])
def test_torch_compile_cannot_run_in_a_folder_that_it_would_not_quote(capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr("repro.lab.scenarios.compile_skew.shutil.which", lambda name: name)
    code, error = fails(capsys, "run", "compile_skew", "--out", tmp_path / name)
    assert code == CANNOT_TELL and f"torch.compile cannot work in {tmp_path / name}" in error
    assert not any((tmp_path / name).iterdir())
    prepare_run_dir(tmp_path / name, RunSettings("metadata_rebuild"))


def test_no_bundle_to_verify_is_a_usage_error(capsys, tmp_path):
    code, error = fails(capsys, "bundle", "--verify", tmp_path / "none.zip")
    assert code == USAGE and f"{tmp_path}/none.zip: no such file" in error


def test_list_names_every_scenario_with_its_source(capsys):
    assert main(["list"]) == EXPECTED
    assert "metadata_rebuild" in capsys.readouterr().out
    assert main(["list", "--json"]) == EXPECTED
    (listed,) = [s for s in json.loads(capsys.readouterr().out) if s["name"] == "metadata_rebuild"]
    assert listed["source"] == "ROCm/ATOM#1690"
    assert (listed["expected"]["verdict"], listed["expected"]["cause"]) == ("deadlock", "extra")


def test_clean_removes_runs_and_nothing_else(tmp_path):
    run = tmp_path / "20261123T112708.815Z-metadata_rebuild-fault-0"
    others = [tmp_path / "DATAZ-important", tmp_path / "20261123T112708.815Z-notes", tmp_path / "file"]
    for folder in (run, *others[:2]):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    others[2].write_text("")
    (tmp_path / "latest").symlink_to(run.name)
    assert main(["clean", "--out", str(tmp_path)]) == EXPECTED
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_hmr_is_the_same_program_under_its_own_name(capsys, monkeypatch):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"hmr": "repro.__main__:main"} and callable(importlib.import_module("repro.__main__").main)
    for argv0, name in (("/usr/bin/hmr", "hmr"), ("repro/__main__.py", "python -m repro")):
        monkeypatch.setattr(sys, "argv", [argv0, "watch", "--help"])
        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().out.startswith(f"usage: {name} watch ")


def test_every_command_answers_in_json(capsys, tmp_path):
    for name in COMMANDS:
        command = parser_of([name])._subparsers._group_actions[0].choices[name]
        assert "--json" in command._option_string_actions, name
    assert main(["clean", "--out", str(tmp_path), "--json"]) == EXPECTED
    assert json.loads(capsys.readouterr().out) == {"removed": [], "still_running": []}


@pytest.mark.parametrize("flags", [{}, {"NO_COLOR": "1", "TERM": "xterm-256color"}, {"FORCE_COLOR": "1"}])
def test_colours_are_off_without_a_terminal_and_under_no_color(flags):
    terminal = "NO_COLOR" in flags or None
    code = (
        "from rich.console import Console; from repro.report.terminal import summary;"
        "from repro.verdict import Verdict; from repro.watch.document import describe;"
        f"summary(Console(force_terminal={terminal}), [describe(Verdict('deadlock', 'extra', (1,)))])"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**clean, **flags}, capture_output=True, text=True
    )
    assert "deadlock" in finished.stdout, finished.stderr
    coloured = any(f"\x1b[{n}m" in finished.stdout for n in range(30, 38))
    assert coloured == ("FORCE_COLOR" in flags), finished.stdout


def test_clean_of_no_folder_is_refused(capsys, tmp_path):
    code, error = fails(capsys, "clean", "--out", tmp_path / "none")
    assert code == USAGE and "no such folder" in error


def test_a_run_that_cannot_begin_leaves_nothing_and_latest_where_it_was(tmp_path):
    settings = RunSettings("metadata_rebuild", "control")
    (tmp_path / "latest").mkdir()
    with pytest.raises(OutputError, match=f"cannot write to {tmp_path}"):
        prepare_run_dir(tmp_path, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    (tmp_path / "latest").rmdir()
    (tmp_path / "latest").symlink_to("earlier")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OutputError):
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
        prepare_run_dir(tmp_path, settings)
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert os.readlink(tmp_path / "latest") == "earlier"


def test_exit_codes_tell_wrong_from_undecided():
    expected = describe(Verdict("clean"), matches_expected=True)
    undecided = describe(Verdict("inconclusive"), matches_expected=False)
    wrong = describe(Verdict("deadlock"), matches_expected=False)
    assert exit_code([expected, expected]) == EXPECTED
    assert exit_code([expected, undecided]) == CANNOT_TELL
    assert exit_code([undecided, wrong]) == UNEXPECTED


@pytest.mark.parametrize(
    ("events", "where"),
    [
        ([("lock_wait", "a.lock")], "waits for lock a.lock"),
        ([("lock_wait", "a.lock"), ("lock_held", "a.lock")], "holds lock a.lock"),
        ([("build_begin", "kernel\x1b[2J")], "builds kernel\x1b[2J"),
        ([("build_begin", "k"), ("build_end", "k")], "computing"),
    ],
)
def test_the_live_table_tells_who_waits_for_a_lock_and_who_builds(tmp_path, events, where):
    scene = Scene(2, {"dp": (0, 1)})
    scene.phase("serve")
    for event, name in events:
        scene.recorders[0].local(event, name)
    (tmp_path / "rank000.wit").write_bytes(bytes(scene.files[0]))
    tail = Tail(tmp_path / "rank000.wit")
    assert row_of(tail, 0).where == where
    console = Console(file=io.StringIO(), width=200)
    console.print(LiveTable("t", Live(console=console), tail.writer()).draw([tail]))
    assert "\x1b" not in console.file.getvalue() and where.replace("\x1b", "␛") in console.file.getvalue()


def test_a_scenarios_defaults_stand_under_a_users_file_and_that_under_the_flags():
    flags = {"scenario": "silent_pairing", "seed": 3}
    plain = settings_of(flags)
    assert (plain.tp_size, plain.workload.max_requests, plain.engine.unfinished_interval) == (8, 1, 16)
    changed = settings_of(flags, {"seed": 1, "engine": {"unfinished_interval": 4}, "tp_size": 4})
    assert (changed.seed, changed.tp_size, changed.engine.unfinished_interval) == (3, 4, 4)
    assert changed.model == plain.model and changed.workload == plain.workload
