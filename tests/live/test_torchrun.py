"""End to end under torchrun, as a user runs it: right verdicts, and nothing left behind however a run ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from program_server import TORCHRUN

from repro.exit_codes import EXPECTED, INTERRUPTED, UNEXPECTED
from repro.lab import scenarios
from repro.lab.start import job, launch
from repro.report.terminal import Display
from repro.store.run_dir import read_json
from repro.trace.witness.file import Tail
from repro.trace.witness.format import Kind
from repro.trace.witness.parse import WitnessError

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90
REPEATS = int(os.environ.get("HMR_LIVE_REPEATS", "10"))


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "repro", "run", "metadata_rebuild", *map(str, arguments)]


def _wait_until_serving(out: Path, num_ranks: int) -> Path:
    """The run directory, once every rank has served a step."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for run_dir in out.glob("*Z-*"):
            with contextlib.suppress(OSError, WitnessError):
                events = [Tail(run_dir / "events" / f"rank{rank:03d}.wit").last_event() for rank in range(num_ranks)]
                if all(event and event.step >= 2 and event.kind != Kind.DONE for event in events):
                    return run_dir
        time.sleep(0.02)
    raise AssertionError(f"no run below {out} came to serve within {DEADLINE_S} s")


LAUNCHERS = pytest.mark.parametrize("launcher", ["fork", pytest.param("torchrun", marks=pytest.mark.full)])
"""What the launcher owes its user is the same for both; forked ranks start in half a second."""


@LAUNCHERS
def test_all_variants_give_their_verdicts_as_json(tmp_path, leaves_nothing, launcher):
    config = tmp_path / "config.json"
    config.write_text('{"model": {"layer_pattern": "GMAG"}, "engine": {"unfinished_interval": 16}}')
    run = subprocess.run(
        command(
            *("--variant", "all", "--ranks", 2, "--launcher", launcher),
            *("--config", config, "--out", tmp_path, "--json"),
        ),
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert run.returncode == EXPECTED, run.stdout + run.stderr
    documents = json.loads(run.stdout)
    assert [(d["variant"], d["verdict"], d["cause"]) for d in documents] == [
        ("control", "clean", None),
        ("fault", "deadlock", "extra"),
        ("fix", "clean", None),
    ]
    assert all(d["matches_expected"] for d in documents)
    assert read_json(tmp_path / "latest" / "verdict.json") == documents[-1]


def test_plain_torchrun_ends_by_itself_with_the_same_verdict_file(programs, tmp_path, leaves_nothing):
    run = programs.run(
        TORCHRUN,
        *("--standalone", "--nproc-per-node", "2"),
        *("-m", "repro.worker", "metadata_rebuild", "--variant", "fault", "--out", str(tmp_path)),
        cwd=ROOT, timeout_s=DEADLINE_S, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert run.returncode == 1, "torchrun ends with 1 when ranks were ended"
    verdict = read_json(tmp_path / "latest" / "verdict.json")
    assert (verdict["verdict"], verdict["cause"]) == ("deadlock", "extra") and verdict["matches_expected"], verdict


@LAUNCHERS
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_an_interrupted_run_writes_its_evidence_first(tmp_path, leaves_nothing, number, launcher):
    # with the fault it hangs, and so has not ended before the signal comes
    arguments = ("--variant", "fault", "--ranks", 2, "--quiet-window", 60, "--launcher", launcher, "--out", tmp_path)
    run = subprocess.Popen(command(*arguments), cwd=ROOT)
    try:
        run_dir = _wait_until_serving(tmp_path, 2)
        run.send_signal(number)
        assert run.wait(60) == INTERRUPTED
    finally:
        run.kill()
    verdict = read_json(run_dir / "verdict.json")
    assert any("interrupted" in line for line in verdict["evidence"])
    assert all((run_dir / "stacks" / f"rank{rank:03d}.txt").stat().st_size for rank in range(2))


@LAUNCHERS
def test_killing_the_parent_ends_everything_it_started(tmp_path, leaves_nothing, launcher):
    arguments = ("--variant", "fault", "--ranks", 2, "--quiet-window", 60, "--launcher", launcher, "--out", tmp_path)
    run = subprocess.Popen(command(*arguments), cwd=ROOT)
    _wait_until_serving(tmp_path, 2)
    run.kill()
    run.wait()


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "fork"])
def test_a_torch_that_does_not_load_is_told_and_not_called_slow(tmp_path, leaves_nothing, launcher):
    broken = tmp_path / "path" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    arguments = ("--ranks", 2, "--launcher", launcher, "--out", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(broken.parent)}
    run = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
    assert run.returncode == UNEXPECTED, run.stdout + run.stderr
    text = " ".join(run.stdout.split())
    assert "ranks 0,1 never began: logs/launcher.log says ImportError: libcudart.so.12: cannot open" in text, text
    assert read_json(tmp_path / "latest" / "verdict.json")["verdict"] == "crash"


@pytest.mark.full
def test_runs_share_the_process_that_forks_and_one_that_was_killed_is_replaced(tmp_path, leaves_nothing):
    document = {"num_ranks": 2, "model": {"layer_pattern": "G"}, "engine": {"unfinished_interval": 8}}
    settings = scenarios.settings_of({"scenario": "metadata_rebuild", "variant": "fault", "checks": "agree"}, document)
    server, pids = job.ForkServer(), []
    try:
        for _ in range(3):
            _, verdict = launch.run(settings, tmp_path, launch.Interrupt(), Display(), server.start)
            assert verdict.matches_expected, verdict
            pids.append(server._process.pid)
            if len(pids) == 2:
                server.close()
    finally:
        server.close()
    assert pids[0] == pids[1] != pids[2]


@pytest.mark.full
def test_killing_the_parent_during_start_up_ends_everything_it_started(tmp_path, leaves_nothing):
    run = subprocess.Popen(command("--variant", "control", "--ranks", 2, "--out", tmp_path), cwd=ROOT)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and len(psutil.Process(run.pid).children(recursive=True)) < 4:
        time.sleep(0.01)
    run.kill()  # torchrun, the reference and two ranks have begun, and the ranks do not yet know their parent
    run.wait()


@pytest.mark.full
def test_a_run_listens_on_loopback_alone(tmp_path, leaves_nothing):
    run = subprocess.Popen(command("--variant", "control", "--ranks", 2, "--out", tmp_path), cwd=ROOT)
    try:
        _wait_until_serving(tmp_path, 2)
        family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1", "::1"}, listening
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)


@pytest.mark.full
@LAUNCHERS
def test_two_runs_side_by_side_do_not_disturb_each_other(tmp_path, leaves_nothing, launcher):
    arguments = ("--variant", "fault", "--ranks", 2, "--launcher", launcher, "--out", tmp_path)
    runs = [subprocess.Popen(command(*arguments, "--seed", seed), cwd=ROOT) for seed in (0, 1)]
    assert [run.wait(DEADLINE_S) for run in runs] == [EXPECTED, EXPECTED]
    verdicts = [read_json(path) for path in tmp_path.glob("*Z-*/verdict.json")]
    assert sorted(verdict["seed"] for verdict in verdicts) == [0, 1]


def _descendant(pid: int, word: str) -> psutil.Process:
    """The process below ``pid`` that was started with an argument of that name."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if word in process.cmdline():
                    return process
        time.sleep(0.02)
    raise AssertionError(f"no process with {word} below {pid} within {DEADLINE_S} s")


def _watch(run_dir: Path, *flags: str) -> tuple[int, dict]:
    arguments = [sys.executable, "-m", "repro", "watch", str(run_dir), "--json", *flags]
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    answer = json.loads(run.stdout)
    return run.returncode, answer[0] if isinstance(answer, list) else answer


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_killing_torchrun_is_a_crash(tmp_path, leaves_nothing):
    for repeat in range(REPEATS):
        out = tmp_path / str(repeat)
        run = subprocess.Popen(command("--variant", "control", "--out", out), cwd=ROOT)
        try:
            run_dir = _wait_until_serving(out, 8)
            _descendant(run.pid, "torch.distributed.run").kill()
            assert run.wait(DEADLINE_S) == UNEXPECTED
        finally:
            run.kill()
            run.wait()
        verdict = read_json(run_dir / "verdict.json")
        assert (verdict["verdict"], verdict["cause"]) == ("crash", "dead_rank"), verdict


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_when_the_watcher_of_a_plain_torchrun_is_killed_another_gives_the_verdict(tmp_path, leaves_nothing):
    for repeat in range(REPEATS):
        out = tmp_path / str(repeat)
        run = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"),
                *("-m", "repro.worker", "metadata_rebuild", "--variant", "fault", "--out", str(out)),
            ],
            cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
        )  # fmt: skip
        try:
            _descendant(run.pid, "--end").kill()
            run_dir = _wait_until_serving(out, 8)
            code, verdict = _watch(run_dir, "--end")
            assert (code, verdict["verdict"], verdict["cause"]) == (EXPECTED, "deadlock", "extra"), verdict
            assert read_json(run_dir / "verdict.json") == verdict
            run.wait(DEADLINE_S)
        finally:
            run.kill()
            run.wait()


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_when_the_launcher_is_killed_its_run_directory_still_tells_a_crash(tmp_path, leaves_nothing):
    for repeat in range(REPEATS):
        out = tmp_path / str(repeat)
        run = subprocess.Popen(command("--variant", "control", "--out", out), cwd=ROOT)
        try:
            run_dir = _wait_until_serving(out, 8)
        finally:
            run.kill()
            run.wait()
        code, verdict = _watch(run_dir)
        assert (code, verdict["verdict"], verdict["cause"]) == (UNEXPECTED, "crash", "dead_rank"), verdict


@pytest.mark.full
def test_the_rank_that_torchrun_loses_is_the_one_culprit_and_the_others_leave_their_stacks(tmp_path, leaves_nothing):
    """torchrun asks all others to end 0.1 s after it has lost one; they stay until they were looked at."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "repro", "run", "rank_death", "--variant", "fault", "--ranks", "4"),
            *("--out", str(tmp_path), "--json"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert run.returncode == EXPECTED, run.stdout + run.stderr
    (document,) = json.loads(run.stdout)
    (culprit,) = document["culprits"]
    states = [position["state"] for position in document["ranks"]]
    assert [rank for rank, state in enumerate(states) if state == "dead"] == [culprit], states
    stacks = tmp_path / "latest" / "stacks"
    assert all((stacks / f"rank{rank:03d}.txt").stat().st_size for rank in range(4) if rank != culprit)


@pytest.mark.full
def test_an_interrupt_of_a_plain_torchrun_ends_ranks_that_wait_in_gloo_and_blames_none(tmp_path, leaves_nothing):
    """Waiting in gloo a rank runs no Python handler; torchrun kills one only after 30 s."""
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "repro.worker", "metadata_rebuild", "--variant", "fault", "--quiet-window", "60"),
            *("--out", str(tmp_path)),
        ],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        run_dir = _wait_until_serving(tmp_path, 2)
        time.sleep(1.0)  # until they hang: the quiet window is too long for a verdict
        run.send_signal(signal.SIGINT)
        run.wait(60)
    finally:
        run.kill()
        run.wait()
    verdict = read_json(run_dir / "verdict.json")
    assert (verdict["verdict"], verdict["culprits"], verdict["interrupted"]) == ("inconclusive", [], True), verdict
    shutil.rmtree(next(tmp_path.glob("torchelastic_*")), ignore_errors=True)  # which torch leaves behind
