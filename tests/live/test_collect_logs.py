"""`collect` with the logs of a job: those that the user names, and those that the job's processes write to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from hanging import kill_job

from repro.commands.cli import main
from repro.hosts.looks import log_files
from repro.hosts.looks.proc import read_status

DIED = (
    "(EngineCore_DP{rank} pid=41) ERROR 11-29 01:23:51 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
    "unexpectedly (exit code: {code}), shutting down executor.\n"
)
LOST = (
    "(Worker_DP0_EP0 pid=42) ERROR 11-29 01:23:51 [multiproc_executor.py:1063] RuntimeError: [gloo/transport/tcp/"
    "pair.cc:553] Connection closed by peer [127.0.0.1]:37581\n"
)
WAITER = "import threading; threading.Event().wait(120)"


def collect(capsys, out, *arguments):
    capsys.readouterr()
    code = main(["collect", "--json", "--to", str(out / "runs"), "--interval", "0.6", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if printed.out else {}, printed.err


@pytest.fixture
def ranks(tmp_path):
    """Start two processes with rank variables, whose output goes to files; all are killed at the end."""
    started = []

    def start(*names):
        for rank, name in enumerate(names):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid())}  # fmt: skip
            with (tmp_path / name).open("ab") as log:
                command = [sys.executable, "-S", "-E", "-c", WAITER]
                started.append(
                    subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
                )
        end_s = time.monotonic() + 60
        while any(read_status(process.pid).state != "S" for process in started):
            assert time.monotonic() < end_s, "the processes did not start"
            time.sleep(0.05)
        return [process.pid for process in started]

    yield start
    kill_job([process.pid for process in started], tmp_path)
    for process in started:
        process.wait()


@pytest.mark.parametrize(("code", "cause"), [("-9", "killed"), ("None", "dead_rank")])
def test_a_job_that_is_gone_is_judged_by_its_logs(tmp_path, capsys, code, cause):
    ended = subprocess.Popen([sys.executable, "-S", "-E", "-c", ""])
    ended.wait()
    (tmp_path / "rank0.log").write_text(LOST)
    (tmp_path / "rank1.log").write_text(DIED.format(rank=1, code=code))
    logs = ["--log", tmp_path / "rank0.log", tmp_path / "rank1.log"]
    exit_code, document, messages = collect(capsys, tmp_path, ended.pid, *logs)
    assert (exit_code, document["verdict"], document["cause"], document["culprits"]) == (0, "crash", cause, [1])
    assert document["confidence"] == ("certain" if cause == "killed" else "likely")
    assert "no process of the job is left" in messages and not document["not_understood"]


def test_two_workers_that_end_in_one_second_are_suspects(tmp_path, capsys):
    for rank in (0, 1):
        began = f"(Worker_DP{rank}_EP{rank} pid=4{rank}) INFO 11-29 01:23:40 [worker.py:1] ready\n"
        (tmp_path / f"rank{rank}.log").write_text(began + DIED.format(rank=rank, code="None"))
    _, document, _ = collect(capsys, tmp_path, "--log", tmp_path / "rank0.log", tmp_path / "rank1.log")
    assert (document["verdict"], document["culprits"], document["suspects"]) == ("crash", [], [0, 1])


def test_the_logs_that_the_processes_write_are_found_and_an_error_of_an_earlier_process_is_none_of_these(
    ranks, tmp_path, capsys
):
    (tmp_path / "stdout-a").write_text("[rank0]: NCCL version 2.28.9\n")
    (tmp_path / "stdout-b").write_text("step 1\nstep 2\n")
    (tmp_path / "all.log").write_text(DIED.format(rank=1, code="-9"))
    pids = ranks("stdout-a", "stdout-b")
    _, document, _ = collect(capsys, tmp_path, *pids, "--log", tmp_path / "all.log")
    assert document["verdict"] == "inconclusive" and not document["culprits"], document
    assert {name for name in document["files"] if name.startswith("logs/")} == {"logs/all.log", "logs/rank_0_stdout-a"}
    assert not document["not_understood"], "a log without a known message is left out"


def test_logs_alone_bring_in_the_job_that_writes_them_and_no_other(ranks, tmp_path, capsys):
    (tmp_path / "mine.log").write_text("NCCL version 2.28.9\n")
    (tmp_path / "other.log").write_text(DIED.format(rank=1, code="-9"))
    ranks("mine.log", "mine.log")
    _, document, _ = collect(capsys, tmp_path, "--log", tmp_path / "mine.log")
    assert sum(name.startswith("facts/") for name in document["files"]) == 2, document["files"]
    assert [name for name in document["files"] if name.startswith("logs/")] == ["logs/mine.log"]
    _, document, _ = collect(capsys, tmp_path, "--log", tmp_path / "other.log")
    assert document["files"] == ["logs/other.log"], "a job that does not write this log has nothing to do with it"


def test_of_a_large_log_the_beginning_and_the_end_are_copied(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log_files, "HEAD_BYTES", 300)
    monkeypatch.setattr(log_files, "TAIL_BYTES", 500)
    (tmp_path / "rank1.log").write_text("first\n" + "step\n" * 2000 + DIED.format(rank=1, code="-9") + "last\n")
    (tmp_path / "rank0.log").write_text(LOST)
    _, document, _ = collect(capsys, tmp_path, "--log", tmp_path / "rank0.log", tmp_path / "rank1.log")
    assert (document["verdict"], document["culprits"]) == ("crash", [1])
    (copy,) = (tmp_path / "runs").glob("*/logs/rank1.log")
    assert copy.read_text().startswith("first\n") and copy.read_text().endswith("last\n")
    assert copy.stat().st_size < 1000


@pytest.mark.parametrize("name", ["nothing.log", "folder", "pipe"])
def test_a_log_that_is_no_file_is_refused_with_one_line(tmp_path, capsys, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit) as end:
        sys.exit(main(["collect", "--to", str(tmp_path / "runs"), "--log", str(tmp_path / name)]))
    assert end.value.code == 2 and not (tmp_path / "runs").exists()
    assert capsys.readouterr().err.count("\n") == 1
