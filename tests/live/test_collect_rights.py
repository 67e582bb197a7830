"""`collect` where stacks cannot be taken: no py-spy, another user, one process of several; and doors of the program."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hanging import kill_job

from repro.commands.cli import main
from repro.hosts.looks import collection, py_spy
from repro.hosts.looks.proc import read_status
from repro.hosts.parent import die_with_parent

LOCK_AND_BUILD = """
import ctypes, fcntl, os, subprocess, sys, time
def die_with_parent(): ctypes.CDLL(None).prctl(1, 9)
rank, lock = int(os.environ["RANK"]), open(sys.argv[1], "w")
while rank and not os.path.exists(sys.argv[1] + ".held"): time.sleep(0.01)
fcntl.flock(lock, fcntl.LOCK_EX)
open(sys.argv[1] + ".held", "w").close()
subprocess.run([sys.argv[2], "-c", "while :; do :; done", "expert_kernel.cu"], preexec_fn=die_with_parent)
"""
STRAGGLER = """
import os, threading, time
end_s = time.monotonic() + 60
if os.environ["RANK"] == "1":
    while time.monotonic() < end_s: sum(range(10_000))
threading.Event().wait(120)
"""
FAULTHANDLER = """
import faulthandler, signal, threading
faulthandler.register(signal.SIGUSR1)
def step(): threading.Event().wait(120)
step()
"""


def end_with_the_tests():
    """Also where the tests are killed: some of the programs spin, and so do the children that inherit the limit."""
    die_with_parent()
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


@pytest.fixture
def ranks(tmp_path):
    """Start two processes with rank variables that run a program; all are killed at the end, with their children."""
    started = []

    def start(program, *arguments):
        for rank in range(2):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid())}  # fmt: skip
            with (tmp_path / f"rank{rank}.log").open("wb") as log:
                command = [sys.executable, "-c", program, *arguments]
                started.append(subprocess.Popen(
                    command, env=environment, stderr=log, start_new_session=True, preexec_fn=end_with_the_tests
                ))  # fmt: skip
        return [process.pid for process in started]

    yield start
    kill_job([process.pid for process in started], tmp_path)
    for process in started:
        process.wait()


@pytest.fixture
def no_py_spy(monkeypatch):
    monkeypatch.setattr(collection, "find_py_spy", lambda: "")


def collected(pids, tmp_path, capsys, *flags):
    capsys.readouterr()
    code = main(["collect", "--to", str(tmp_path / "runs"), "--interval", "1.0", *flags, *map(str, pids)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def wait_for(condition, what):
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.05)


def is_blocked(pid):
    return any("-> FLOCK" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


def test_without_stacks_a_build_under_a_lock_is_named(ranks, no_py_spy, tmp_path, capsys):
    lock, compiler = tmp_path / "kernels.lock", tmp_path / "cicc"
    compiler.symlink_to("/bin/sh")
    pids = ranks(LOCK_AND_BUILD, str(lock), str(compiler))
    wait_for(lambda: is_blocked(pids[1]), "rank 1 does not wait for the lock")
    code, printed, messages = collected(pids, tmp_path, capsys)
    assert code == 0 and printed.startswith("slow, likely, culprits: 0"), printed
    text = " ".join(printed.split())
    assert "rank 1 waits for that lock" in text and str(lock) in text and "cicc expert_kernel.cu" in text, printed
    assert "py-spy is not installed" in messages


@pytest.mark.full
def test_without_stacks_a_straggler_is_named(ranks, no_py_spy, tmp_path, capsys):
    pids = ranks(STRAGGLER)
    time.sleep(0.5)
    code, printed, _ = collected(pids, tmp_path, capsys)
    assert code == 0 and printed.startswith("slow (straggler), likely, culprits: 1"), printed


@pytest.mark.full
def test_another_user_sees_the_straggler_and_is_given_the_missing_right(ranks, tmp_path, capfd):
    if os.geteuid() != 0:
        pytest.skip("only root can look with the eyes of another user")
    pids = ranks(STRAGGLER)
    time.sleep(0.5)
    out = tmp_path / "runs"
    out.mkdir()
    for folder in (out, *list(out.parents)[:4]):
        folder.chmod(0o777)
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        code = main(["collect", "--to", str(out), "--interval", "1.0", *map(str, pids)])
        sys.stdout.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    printed = capfd.readouterr()
    assert os.waitstatus_to_exitcode(status) == 0, printed
    assert printed.out.startswith("slow (straggler), likely, culprits: 1"), printed
    assert "numbers of the processes" in printed.out and "run collect as that user, as root" in printed.err, printed


@pytest.mark.full
def test_a_failure_of_py_spy_at_one_process_leaves_the_others(ranks, tmp_path, capsys, monkeypatch):
    pids = ranks(STRAGGLER)
    real = py_spy.take_stacks
    failed = py_spy.Answer(failure="Failed to copy PyVersion symbol")
    monkeypatch.setattr(collection, "take_stacks", lambda program, every: {**real(program, every), pids[0]: failed})
    time.sleep(0.5)
    _, printed, messages = collected(pids, tmp_path, capsys)
    assert printed.startswith("slow (straggler), likely, culprits: 1"), printed
    assert "no stack of rank 0: Failed to copy PyVersion symbol" in messages


@pytest.mark.full
def test_a_py_spy_that_is_too_old_is_called_so_and_the_processes_to_look_at_are_named(
    ranks, tmp_path, capsys, monkeypatch
):
    old = tmp_path / "py-spy"
    old.write_text("#!/bin/sh\necho 'Error: Failed to find python version from target process' >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setattr(collection, "find_py_spy", lambda: str(old))
    pids = ranks(FAULTHANDLER)
    code, printed, messages = collected(pids, tmp_path, capsys)
    assert code == 125 and messages.count("py-spy may be too old for this Python: pip install -U py-spy") == 2, messages
    assert f"for p in {min(pids)} {max(pids)}; do py-spy" in " ".join(printed.split()), printed


@pytest.mark.full
def test_a_named_signal_is_sent_only_where_it_has_a_handler(ranks, no_py_spy, tmp_path, capsys):
    pids = ranks(FAULTHANDLER)
    wait_for(lambda: all(signal.SIGUSR1 in read_status(pid).caught for pid in pids), "no handler")
    collected(pids, tmp_path, capsys, "--allow-signals", "USR1")
    files = sorted((tmp_path / "runs").rglob("rank_*.look1.txt"))
    assert len(files) == 2 and all("in step" in file.read_text() for file in files)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    collected(pids, tmp_path, capsys, "--allow-signals", "USR2")
    assert all(Path(f"/proc/{pid}").exists() for pid in pids), "USR2 has no handler and would end them"
