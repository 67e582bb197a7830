"""`collect` on processes that are gone, foreign, many or about to end, and on disks that do not take what it writes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hanging import kill_job

from repro.commands.cli import main
from repro.hosts.looks import collection
from repro.hosts.looks.proc import read_status

WAITER = "import threading; threading.Event().wait(120)"


@pytest.fixture
def start(tmp_path):
    """Start processes with rank variables that wait for ever; all are killed at the end."""
    started = []

    def start_ranks(count, prefix=(), **more):
        for rank in range(count):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(os.getpid())}  # fmt: skip
            command = [*prefix, sys.executable, "-S", "-E", "-c", WAITER]
            started.append(subprocess.Popen(command, env=environment, start_new_session=True, **more))
        end_s = time.monotonic() + 60
        while not prefix and any(read_status(process.pid).state != "S" for process in started):
            assert time.monotonic() < end_s, "the processes did not start"
            time.sleep(0.05)
        return [process.pid for process in started]

    yield start_ranks
    kill_job([process.pid for process in started if process.returncode is None], tmp_path)
    for process in started:
        process.wait()


def collect(capsys, out, *arguments):
    capsys.readouterr()
    code = main(["collect", "--to", str(out), "--interval", "0.6", *map(str, arguments)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return code, printed.out, printed.err


def test_a_process_that_has_ended_is_refused_with_one_line(tmp_path, capsys):
    ended = subprocess.Popen([sys.executable, "-S", "-E", "-c", ""])
    while read_status(ended.pid).state != "Z":
        time.sleep(0.01)
    code, _, messages = collect(capsys, tmp_path, ended.pid)
    assert code == 2 and "has not reaped it" in messages
    ended.wait()
    code, _, messages = collect(capsys, tmp_path, ended.pid)
    assert code == 2 and "has ended, or is in another pid namespace" in messages
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["x"], ["0"], ["-1"], ["99999999999"], ["--match", "("], ["--interval", "0"], ["--interval", "x"],
                  ["--allow-signals", "KILL"], ["--match", "no such program runs here"]],
)  # fmt: skip
def test_wrong_arguments_print_one_line_and_make_no_folder(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        sys.exit(main(["collect", "--to", str(tmp_path), *arguments]))
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.full
def test_a_rank_that_ends_between_the_looks_is_named(start, tmp_path, capsys, monkeypatch):
    pids = start(3)
    real = collection.time.sleep
    monkeypatch.setattr(collection.Collection.collect, "__defaults__", (lambda s: os.kill(pids[1], 9) or real(s),))
    code, printed, _ = collect(capsys, tmp_path, *pids)
    assert code == 0 and printed.startswith("crash (dead_rank), likely, culprits: 1"), printed


@pytest.mark.full
@pytest.mark.parametrize("place", ["/proc/no", "/dev/null"])
def test_a_folder_that_cannot_be_made_is_refused(start, capsys, place):
    code, _, messages = collect(capsys, place, *start(2))
    assert code == 2 and "choose another --to" in messages


@pytest.mark.full
def test_a_full_disk_is_no_fault_of_the_job(start, tmp_path, capsys, monkeypatch):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(collection, "write_json", full)
    code, printed, messages = collect(capsys, tmp_path, *start(2))
    assert code == 125 and not printed and "No space left on device" in messages and messages.count("\n") == 1
    (folder,) = tmp_path.iterdir()
    assert f"what was collected before is in {folder}" in messages


@pytest.mark.full
def test_an_interrupt_ends_collect_at_once_and_changes_nothing_in_the_job(start, tmp_path):
    pids = start(2)
    command = [sys.executable, "-m", "repro", "collect", "--interval", "60", "--to", str(tmp_path), str(pids[0])]
    collector = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end_s = time.monotonic() + 60
    while not list(tmp_path.rglob("*.look1.json")):
        assert time.monotonic() < end_s and collector.poll() is None
        time.sleep(0.05)
    collector.send_signal(signal.SIGINT)
    printed, messages = collector.communicate(timeout=20)
    assert (collector.returncode, printed, messages.count("\n") <= 1) == (130, "", True), messages
    assert all(read_status(pid).state == "S" for pid in pids)


@pytest.mark.full
@pytest.mark.parametrize("redirection", ["| head -c 1 >/dev/null; exit ${PIPESTATUS[0]}", ">&-", "2>&-"])
def test_a_closed_output_costs_no_evidence(start, tmp_path, redirection):
    pids = start(2)
    shell = f"{sys.executable} -m repro collect --interval 0.6 --to {tmp_path} {pids[0]} {redirection}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 125 and "Traceback" not in done.stderr, done
    assert len(list(tmp_path.glob("*/report.html"))) == 1


@pytest.mark.full
def test_several_jobs_are_listed_and_one_is_asked_for(start, tmp_path, capsys, monkeypatch):
    from repro.commands import collect as command

    first, second = start(2)[:2], None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    second = start(2)[2:]
    jobs = [job for job in command.find_jobs(command.read_all()) if set(job.pids) & {*first, *second}]
    assert sorted(job.pids for job in jobs) == sorted([tuple(first), tuple(second)])
    code, _, messages = collect(capsys, tmp_path, first[0], second[0])
    assert code == 2 and "2 jobs run here: choose one" in messages
    assert all(str(pid) in messages for pid in (*first, *second))


@pytest.mark.full
def test_two_looks_at_one_job_at_once_do_not_meet(start, tmp_path):
    pids = start(2)
    command = [sys.executable, "-m", "repro", "collect", "--to", str(tmp_path), *map(str, pids)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    results = [process.communicate() for process in both]
    assert {process.returncode for process in both} == {125}, results
    assert len(list(tmp_path.iterdir())) == 2 and all(
        (folder / "report.html").is_file() for folder in tmp_path.iterdir()
    )


@pytest.mark.full
def test_a_job_of_64_processes_is_looked_at(start, tmp_path, capsys):
    pids = start(64)
    code, printed, messages = collect(capsys, tmp_path, pids[5])
    assert code == 125 and "ranks 0-63 of 64, 64 processes" in messages, messages
    assert len(list(tmp_path.rglob("*.look2.json"))) == 65, printed


@pytest.mark.full
def test_a_job_in_a_pid_namespace_of_its_own_is_looked_at_from_outside(start, tmp_path, capsys):
    unshare = shutil.which("unshare")
    if os.geteuid() != 0 or unshare is None:
        pytest.skip("only root makes a pid namespace")
    start(2, prefix=[unshare, "--pid", "--fork"])
    time.sleep(2)
    code, _, messages = collect(capsys, tmp_path, "--match", f"{WAITER[:24]}.*")
    assert code == 125 and len(list(tmp_path.rglob("rank_*.look2.json"))) == 2, messages
