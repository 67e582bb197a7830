"""How a command and its ranks end: by a signal, without their launcher, by a variable that is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fails

from repro.commands.cli import main
from repro.exit_codes import CANNOT_TELL, INTERRUPTED, USAGE
from repro.hosts.interrupt import Interrupt
from repro.lab.outcome.expectation import document_of
from repro.lab.rank import worker
from repro.lab.start import job
from repro.store.run_dir import RunDir, read_json
from repro.verdict import Verdict

ROOT = Path(__file__).resolve().parents[2]
REPRO = [sys.executable, "-W", "error", "-m", "repro"]


def start(*arguments, **options) -> subprocess.Popen:
    command = [*REPRO, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_command_at_once_and_is_only_noted_where_evidence_must_be_kept(number):
    interrupt, before = Interrupt(), signal.getsignal(number)
    with interrupt.installed():
        with interrupt.deferred():
            signal.raise_signal(number)
        assert interrupt()
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.installed():
        signal.raise_signal(number)
    assert interrupt() and signal.getsignal(number) == before


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "place", ["repro.lab.start.kernel_cache.fill", "repro.lab.start.prepare.create", "repro.commands.run.plan"]
)
def test_a_signal_before_the_ranks_start_ends_the_command_and_leaves_nothing(
    capsys, tmp_path, monkeypatch, number, place
):
    monkeypatch.setattr(place, lambda *args: signal.raise_signal(number))
    assert main(["run", "metadata_rebuild", "--out", str(tmp_path)]) == INTERRUPTED
    assert not any(tmp_path.iterdir())


def test_a_signal_while_torch_is_imported_for_the_ranks_gives_a_verdict(tmp_path, monkeypatch):
    """The process that forks the ranks may take long to start, and is not waited for then."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    begin = job.start_process

    def start_slowly(argv, run_dir, *rest, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(command, run_dir, *rest, **options)

    monkeypatch.setattr(job, "start_process", start_slowly)
    arguments = ["run", "metadata_rebuild", "--ranks", "2", "--launcher", "fork", "--out", str(tmp_path)]
    assert main(arguments) == INTERRUPTED
    verdict = read_json(tmp_path / "latest" / "verdict.json")
    assert verdict["verdict"] == "inconclusive" and verdict["interrupted"]


# -- environment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HMR_KERNELS", "nonsense", "HMR_KERNELS: 'nonsense' is not one of auto, torch, native"),
        ("HMR_KERNELS", "nativ", "(did you mean 'native'?)"),
        ("HMR_KERNEL_CHECKS", "yes", "HMR_KERNEL_CHECKS: 'yes' is not one of 0, 1"),
        ("HMR_NATIVE_ISA", "avx9", "HMR_NATIVE_ISA: 'avx9' is not one of generic, avx2"),
        ("HMR_KERNEL_CACHE", "/dev/null", "HMR_KERNEL_CACHE: '/dev/null' is not a folder"),
        ("HMR_NATIVE_DIR", "/etc/passwd", "HMR_NATIVE_DIR: '/etc/passwd' is not a folder"),
    ],
)
def test_a_variable_that_every_rank_would_fail_on_is_refused_before_they_start(
    capsys, tmp_path, monkeypatch, name, value, words
):
    monkeypatch.setenv(name, value)
    code, line = fails(capsys, "run", "metadata_rebuild", "--out", tmp_path)
    assert code == USAGE and words in line and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("HMR_LAUNCHER", "abc", "HMR_LAUNCHER: 'abc' is not of the form PID:TICKS"),
        ("HMR_RUN_DIR", "/nonexistent", "HMR_RUN_DIR: '/nonexistent' is not a run directory"),
        ("RANK", "x", "RANK: 'x' is not a number of at least 0"),
        ("RANK", "-1", "RANK: '-1' is not a number"),
        ("RANK", "2", "RANK: 2 is not one of the 2 ranks of WORLD_SIZE"),
        ("WORLD_SIZE", "0", "WORLD_SIZE: '0' is not a number of at least 1"),
        ("WORLD_SIZE", "1e18", "WORLD_SIZE: '1e18' is not a number"),
        ("LOCAL_RANK", "²", "LOCAL_RANK: '²' is not a number"),
        ("HMR_KERNELS", "nonsense", "HMR_KERNELS: 'nonsense' is not one of"),
    ],
)
def test_a_rank_names_the_variable_that_is_wrong(capsys, tmp_path, monkeypatch, name, value, words):
    for usual, number in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(usual, number)
    monkeypatch.setenv(name, value)
    assert worker.main(["metadata_rebuild", "--out", str(tmp_path)]) == USAGE
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and words in line and not any(tmp_path.iterdir())


def test_a_rank_whose_launcher_is_gone_ends_before_its_long_imports():
    gone = subprocess.Popen(["true"])
    gone.wait()
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "repro.worker", "metadata_rebuild"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HMR_LAUNCHER": f"{gone.pid}:12345"},
    )  # fmt: skip
    assert run.returncode == 1 and "argparse" not in run.stderr, run.stderr[-2000:]


# -- all scenarios -----------------------------------------------------------------------------------------------------


def test_a_scenario_that_cannot_be_with_so_many_ranks_is_named_and_the_others_run(capsys, tmp_path, monkeypatch):
    ran = []

    def run(settings, out, *rest):
        ran.append(settings.scenario)
        return RunDir(out), document_of(settings, Verdict("clean"), matches_expected=True)

    monkeypatch.setattr("repro.lab.start.launch.run", run)
    monkeypatch.setattr("repro.commands.run.write_reports", lambda *args: None)
    monkeypatch.setattr("repro.lab.scenarios.names", lambda: ["idle_skip", "silent_pairing"])
    assert main(["run", "all", "--ranks", "4", "--out", str(tmp_path), "--json"]) == CANNOT_TELL
    out, err = capsys.readouterr()
    documents = json.loads(out)
    assert ran == ["idle_skip"] and [d["scenario"] for d in documents] == ["idle_skip", "silent_pairing"]
    assert documents[1]["skipped"] == "tp_size: 4 ranks cannot be divided into groups of 8"
    assert "[2/2] silent_pairing fault: 4 ranks, seed 0: tp_size: 4 ranks cannot be divided into groups of 8" in err
    code, line = fails(capsys, "run", "all", "--quiet-window", "0", "--out", tmp_path)
    assert code == USAGE and "quiet_window_s: 0.0 is not a positive number of seconds" in line
