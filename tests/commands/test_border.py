"""Where the program meets what it does not control: readers that leave, closed files, full disks, its own failures."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import fails
from reported import write_hang
from written import written

from repro.commands.cli import main
from repro.exit_codes import CANNOT_TELL, EXPECTED, UNEXPECTED, USAGE
from repro.hosts import processes
from repro.hosts.interrupt import Interrupt
from repro.lab import scenarios
from repro.lab.settings import read_settings
from repro.lab.start import launch
from repro.lab.start.ending import end, persist
from repro.report.terminal import Display
from repro.store.run_dir import RunDir, read_json
from repro.watch.document import read_document
from repro.watch.live import Watch

ROOT = Path(__file__).resolve().parents[2]
REPRO = [sys.executable, "-W", "error", "-m", "repro"]


def start(*arguments, **options) -> subprocess.Popen:
    command = [*REPRO, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


# -- output ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["list", "watch", "report", pytest.param("run", marks=pytest.mark.full)])
def test_a_reader_that_leaves_changes_neither_verdict_nor_exit_code(tmp_path, command):
    """Also run with every warning an error: nothing is left open."""
    arguments = [command]
    if command == "run":
        config = tmp_path / "config.json"
        config.write_text('{"model": {"layer_pattern": "G"}, "engine": {"unfinished_interval": 8}}')
        arguments += ["metadata_rebuild", "--ranks", "2", "--launcher", "fork", "--config", config, "--out", tmp_path]
    elif command != "list":
        arguments.append(write_hang(tmp_path, 2)[0])
    run = start(*arguments, stdout=subprocess.PIPE)
    run.stdout.close()
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (UNEXPECTED if command == "watch" else EXPECTED, "")
    if command == "run":
        verdict = read_json(tmp_path / "latest" / "verdict.json")
        assert (verdict["verdict"], verdict["matches_expected"]) == ("deadlock", True), verdict
        assert (tmp_path / "latest" / "report.html").exists()


@pytest.mark.parametrize(("command", "closed"), [("list", ">&-"), ("watch", "2>&-"), ("report", "<&- >&- 2>&-")])
def test_a_standard_file_that_is_closed_changes_no_exit_code(tmp_path, command, closed):
    root, _ = write_hang(tmp_path, 2)
    before = (root / "verdict.json").read_bytes()
    line = " ".join([*REPRO, command, *([str(root)] if command != "list" else []), closed])
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (UNEXPECTED if command == "watch" else EXPECTED, "")
    assert (root / "verdict.json").read_bytes() == before, "output went into a file that took its number"


def test_a_full_disk_under_the_output_does_not_end_a_command_before_its_work_is_done(tmp_path):
    root, _ = write_hang(tmp_path, 2)
    with Path("/dev/full").open("w") as full:
        run = start("report", root, stdout=full)
        _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (CANNOT_TELL, "repro: standard output: No space left on device\n")
    assert (root / "report.html").exists()


def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = start("watch", tmp_path / "ä", stdout=subprocess.PIPE, env=environment)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == USAGE and errors.count("\n") == 1 and r"\xe4/config.json" in errors


# -- our own failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError("unhashable"), ValueError("a\nb"), KeyError("x"), RecursionError()])
def test_a_failure_of_the_program_is_one_line_that_says_so(capsys, monkeypatch, error):
    def names():
        raise error

    monkeypatch.delenv("HMR_DEBUG", raising=False)
    monkeypatch.setattr(scenarios, "names", names)
    code, line = fails(capsys, "list")
    assert code == CANNOT_TELL and line.startswith("repro: internal error at ")
    assert type(error).__name__ in line and "not of your run or files; set HMR_DEBUG=1" in line
    monkeypatch.setenv("HMR_DEBUG", "1")
    assert main(["list"]) == CANNOT_TELL
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_failure_of_the_report_loses_no_verdict(capsys, tmp_path, monkeypatch):
    root, _ = write_hang(tmp_path, 2)
    decided = read_document(root / "verdict.json")
    monkeypatch.setattr("repro.lab.start.launch.run", lambda *args: (RunDir(root), decided))
    monkeypatch.setattr("repro.report.render", lambda *args: [][1])
    assert main(["run", "metadata_rebuild", "--out", str(tmp_path), "--json"]) == EXPECTED
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["verdict"] == "deadlock" and "no report: internal error at " in err


@pytest.fixture
def hanging(tmp_path):
    """A run that waits for its verdict, and a process of its."""
    run_dir = RunDir(write_hang(tmp_path, 2)[0])
    run_dir.verdict.unlink()
    run_dir.reference.write_text("{}")
    child = subprocess.Popen(["sleep", "600"])
    yield run_dir, read_settings(run_dir.config), child
    child.kill()
    child.wait()


def attend(run_dir, settings, child):
    return launch.attend(run_dir, settings, lambda: False, Display(), lambda: child.poll() is None, [child])


FAILURES = [OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files"), TypeError("a slip")]


@pytest.mark.parametrize(
    "place",
    ["repro.lab.start.launch.Watch", "repro.lab.start.launch.watch_options", "repro.lab.start.launch.start_process"],
)
@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_watch_that_cannot_begin_leaves_a_verdict_and_no_process(hanging, monkeypatch, place, error):
    def fail(*args, **options):
        raise error

    run_dir, settings, child = hanging
    if place.endswith("start_process"):
        run_dir.reference.unlink()
    monkeypatch.setattr(place, fail)
    document = written(attend(run_dir, settings, child))
    assert child.poll() is not None
    assert document == read_json(run_dir.verdict)
    assert (document["verdict"], document["culprits"], document["matches_expected"]) == ("inconclusive", [], False)
    assert (
        type(error).__name__ in document["evidence"][0] and "nothing is known about the run" in document["evidence"][0]
    )
    assert "Traceback" in run_dir.watcher_log.read_text()


def test_ranks_that_cannot_be_started_leave_a_verdict(tmp_path):
    def start(*args):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    settings = scenarios.settings_of({"scenario": "metadata_rebuild", "num_ranks": 2})
    run_dir, document = launch.run(settings, tmp_path, Interrupt(), Display(), start)
    assert document == read_document(run_dir.verdict) and document.verdict == "inconclusive"
    assert "repro itself failed" in document.evidence[0] and not (run_dir.root / "tmp").exists()


def test_a_disk_that_is_full_is_named_and_is_no_failure_of_this_program(hanging, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/a/verdict.json")

    run_dir, settings, child = hanging
    monkeypatch.setattr(Watch, "run", fail)
    (line,) = attend(run_dir, settings, child).evidence
    assert line.startswith("cannot write /runs/a/verdict.json: No space left on device"), line
    assert f"what was recorded is in {run_dir.root}" in line and "failed" not in line


def test_a_full_disk_while_the_failure_is_written_is_named_with_the_run(hanging, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "f")

    run_dir, settings, child = hanging
    monkeypatch.setattr(Watch, "run", fail)
    monkeypatch.setattr("repro.lab.start.launch.write_json", fail)
    monkeypatch.setattr("repro.watch.failure.write_atomically", fail)
    with pytest.raises(OSError, match=f"what is kept of the run is in {run_dir.root}"):
        attend(run_dir, settings, child)
    assert child.poll() is not None and run_dir.witness(0).exists()


def test_a_process_that_cannot_be_killed_is_named_and_not_waited_for(hanging, monkeypatch):
    """As one that waits in the kernel for a driver or a file server."""
    run_dir, _, child = hanging
    monkeypatch.setattr(processes, "REAP_PATIENCE_S", 0.05)
    monkeypatch.setattr("psutil.Process.kill", lambda self: None)
    (line,) = end(run_dir, [child], [])
    assert line.startswith(f"process {child.pid} runs for ") and "could not be ended" in line


def test_ranks_that_cannot_be_looked_up_keep_no_other_process_alive(hanging, monkeypatch):
    def fail(*args):
        raise OSError(errno.EMFILE, "Too many open files")

    run_dir, settings, child = hanging
    monkeypatch.setattr(Watch, "processes", fail)
    attend(run_dir, settings, child)
    assert child.poll() is not None and run_dir.verdict.exists()


def test_evidence_is_on_the_disk_before_anything_is_killed(hanging, monkeypatch):
    order = []
    run_dir, settings, child = hanging
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(processes, "kill", lambda doomed: order.append("kill") or [])
    attend(run_dir, settings, child)
    synced = set(order[: order.index("kill")])
    wanted = [run_dir.witness(0), run_dir.stack(1), run_dir.flight_recorder(0), run_dir.log(1), run_dir.verdict]
    assert {str(path) for path in (*wanted, run_dir.root, run_dir.root / "events")} <= synced


def test_a_disk_that_does_not_answer_is_not_waited_for(hanging):
    run_dir, _, _ = hanging
    (run_dir.root / "stacks" / "rank001.txt").unlink()
    os.mkfifo(run_dir.root / "stacks" / "pipe")
    notices, answered = [], threading.Event()
    persist(run_dir, notices.append, patience_s=60)
    assert notices == [], "a pipe is not written to a disk"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: answered.wait(60))
        persist(run_dir, notices.append, patience_s=0.01)
    answered.set()
    assert len(notices) == 1 and f"{run_dir.root} was not written to its disk within 0.01 s" in notices[0]
