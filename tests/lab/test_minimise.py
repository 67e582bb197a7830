"""Minimising: a predicted verdict is confirmed by a run, and the result is a file that hangs by itself."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ended import has_ended
from reported import AGREE, write_hang, write_run
from scene import Scene

from repro.bundle import replay
from repro.commands.cli import main
from repro.commands.minimise import _print_result
from repro.lab import scenarios
from repro.lab.search.confirmation import run_within
from repro.lab.search.minimise import AnotherVerdict, Runner, minimise
from repro.lab.search.minimise import describe as describe_settings
from repro.report.gather import gather
from repro.verdict import Position, Verdict
from repro.watch.document import describe

ROOT = Path(__file__).resolve().parents[2]


def start(**flags):
    return scenarios.settings_of({"scenario": "metadata_rebuild", "variant": "fault", "checks": "observe", **flags})


def answer(verdict="deadlock", cause="extra", step=2):
    expected = (verdict, cause) == ("deadlock", "extra")
    decided = Verdict(verdict, cause or "", ranks=(Position(0, "blocked", step=step),))
    return describe(decided, matches_expected=expected)


def test_what_is_foretold_is_shrunk_to_two_ranks_and_one_layer_and_then_run():
    tried = []
    result = minimise(scenarios.load("metadata_rebuild"), start(), lambda s: tried.append(s) or answer())
    assert (result.after.num_ranks, result.after.model.layer_pattern) == (2, "G")
    assert result.after.model.num_experts == 2 and result.after.workload.max_requests == 1
    assert (result.verdict, result.cause, result.steps) == ("deadlock", "extra", 3)
    assert tried == [start(), result.after]


@pytest.mark.parametrize("least", [2, 3, 4, 5])
def test_where_the_small_run_says_otherwise_the_smallest_that_holds_is_found(least):
    """A trial in which the hang needs more layers than the scenario predicts."""

    def trial(settings):
        return answer() if len(settings.model.layer_pattern) >= least else answer("clean", None)

    result = minimise(scenarios.load("metadata_rebuild"), start(), trial)
    assert len(result.after.model.layer_pattern) >= least
    assert result.after.num_ranks == 2, "what was shrunk before still counts"


def test_a_run_that_is_not_the_foretold_hang_is_not_shrunk():
    with pytest.raises(AnotherVerdict, match="predicts deadlock extra"):
        minimise(scenarios.load("metadata_rebuild"), start(), lambda s: answer("clean", None))


@pytest.mark.parametrize(("verdict", "code"), [("clean", 1), ("inconclusive", 125)])
def test_minimise_exits_as_run_does_when_the_verdict_is_another(tmp_path, monkeypatch, capsys, verdict, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Runner, "__call__", lambda self, settings: answer(verdict, None))
    assert main(["minimise", "metadata_rebuild"]) == code
    assert f"the verdict on the run is {verdict}" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_one_is_not_printed_as_several(capsys):
    result = minimise(scenarios.load("metadata_rebuild"), start(), lambda s: answer(step=0))
    assert "8 ranks, 8 layers (GGGAMGGA)" in describe_settings(result.before)
    assert describe_settings(result.after).startswith("2 ranks, 1 layer (G), 2 experts top-1, 1 request of at most ")
    _print_result(dataclasses.replace(result, runs=1), Path("x.py"), False)
    output = capsys.readouterr().out
    assert ", 1 step\n1 run in " in output


def test_a_replay_is_short_and_needs_torch_alone(tmp_path):
    root, _ = write_hang(tmp_path, 2)
    text = replay.of_runs(gather(root), None)
    assert text.count("\n") <= 200
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_in_a_replay_a_lock_goes_to_the_rank_that_had_it(tmp_path):
    scene = Scene(4, {"dp": range(4)})
    scene.recorders[1].local("lock_held", "build")
    for rank in (0, 2, 3):
        scene.recorders[rank].local("lock_wait", "build", 101)
    scene.enter([1], AGREE)
    root = write_run(tmp_path, scene, "fault")
    assert gather(root).verdict.cause == "lock"
    programs, _ = replay._programs(root, None)
    acts = {rank: [(act.name, act.op) for act in program] for rank, program in programs.items()}
    waits = [("build", "ask")]
    assert acts == {0: waits, 1: [("build", "acquire"), ("dp", "all_reduce")], 2: waits, 3: waits}
    assert "STALE_LOCKS = []" in replay.of_runs(gather(root), None)


def test_hostile_names_stay_strings_in_a_replay(tmp_path):
    root, _ = write_hang(tmp_path, 2, layer='"""\nimport os; os.abort()\n"""\'@FAULT@\\')
    text = replay.of_runs(gather(root), None)
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    assert "os.abort" not in called


def test_a_run_that_is_not_whole_is_not_replayed(tmp_path):
    root, _ = write_hang(tmp_path, 2)
    (root / "events" / "rank001.wit").unlink()
    with pytest.raises(replay.ReplayError, match="the witnesses of some ranks are missing"):
        replay.of_runs(gather(root), None)


@pytest.mark.full
def test_metadata_rebuild_is_minimised_to_a_file_that_hangs_and_its_fix_passes(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "repro", "minimise", "metadata_rebuild"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "deadlock extra with 2 ranks, 1 layer (G)" in run.stdout
    path = tmp_path / "metadata_rebuild_minimal.py"
    assert path.read_text().count("\n") <= 200
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    fixed = subprocess.run([*torchrun, str(path), "--fix"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert fixed.returncode == 0 and "PASSED" in fixed.stdout, fixed.stdout + fixed.stderr


def test_a_lock_that_was_only_waited_for_is_no_act_of_a_replay():
    """A baton is waited for until it is gone: to let it go would be to remove a file that is not there."""
    made = Scene(1, {})
    for event in ("lock_wait", "lock_freed", "lock_wait", "lock_held", "lock_freed"):
        made.recorders[0].local(event, "/cache/lock")
    assert [act.op for act in replay._acts(made.witnesses()[0], None)] == ["acquire", "release"]


@pytest.mark.parametrize("end", ["time", "interrupt"])
def test_a_file_that_is_tried_and_does_not_end_is_ended_with_all_that_it_started(tmp_path, monkeypatch, end):
    """torchrun, when it is killed, leaves its ranks behind."""
    script, begun = tmp_path / "file.py", tmp_path / "begun"
    start = "import subprocess, sys, time; child = subprocess.Popen(['sleep', '600'])"
    script.write_text(f"{start}; open({str(begun)!r}, 'w').write(f'{{child.pid}} '); time.sleep(600)")

    def communicate(job, timeout):
        while not begun.exists() or not begun.read_text().endswith(" "):
            time.sleep(0.01)
        raise KeyboardInterrupt if end == "interrupt" else subprocess.TimeoutExpired("file.py", timeout)

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt) if end == "interrupt" else contextlib.nullcontext():
        assert run_within([sys.executable, str(script)], 0.1) == (None, "")
    assert has_ended(int(begun.read_text()))
