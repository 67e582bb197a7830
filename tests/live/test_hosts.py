"""Ranks on two hosts, which here are two process and host name namespaces on a network of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from repro.commands.cli import main
from repro.exit_codes import USAGE
from repro.hosts.agent import HostAgent, RemoteHosts
from repro.hosts.host import Host
from repro.lab.outcome.expectation import watch_options
from repro.lab.settings import RunSettings
from repro.lab.start.prepare import prepare_run_dir
from repro.store.run_dir import RunDir, write_json
from repro.trace.recording.recorder import Recorder
from repro.watch.live import Watch

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = RunSettings("metadata_rebuild", "fault", num_ranks=2, quiet_window_s=1.0)
A_RANK = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from repro.trace import identity
from repro.trace.recording import recorder
from repro.store.run_dir import RunDir
from repro.hosts.signals import dump_on_signals
identity.socket.gethostname = lambda: "elsewhere"
run_dir = RunDir(Path({run!r}))
dump_on_signals(run_dir, 1)
recorder.Recorder.open(run_dir.witness(1), 1, 2).phase("connect")
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A run of which rank 0 is this process and rank 1 lives, with its agent, under another host name."""
    run_dir = RunDir.create(tmp_path, "metadata_rebuild", "fault", 0)
    recorder = Recorder.open(run_dir.witness(0), 0, 2)
    recorder.phase("connect")
    command = [sys.executable, "-c", A_RANK.format(root=str(ROOT), run=str(run_dir.root))]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    assert rank.stdout.readline() == b"ready\n"
    host = Host()
    host.here = dataclasses.replace(host.here, hostname="elsewhere")
    agent = HostAgent(run_dir, watch_options(SETTINGS), 1, host)
    thread = threading.Thread(target=agent.run)
    thread.start()
    yield run_dir, rank
    write_json(run_dir.verdict, {})
    thread.join(60)
    rank.kill()
    rank.wait()
    assert not thread.is_alive()


def wait_for(what, patience_s=60.0):
    deadline = time.monotonic() + patience_s
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


def test_on_another_host_stacks_are_collected_and_a_death_is_seen(elsewhere, monkeypatch):
    run_dir, rank = elsewhere
    stack = run_dir.stack(1)
    seconds = itertools.count(1)

    def monotonic():
        """Passes only when the stack is there, however long that takes; the dump never comes."""
        return next(seconds) if stack.exists() and "<string>" in stack.read_text() else 0

    monkeypatch.setattr("repro.hosts.collect.time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    watch = Watch(run_dir, watch_options(SETTINGS), job_alive=lambda: True)
    others = RemoteHosts(run_dir, Host())
    wait_for(others.any_running)
    gaps = others.answers(others.request_evidence(), patience_s=60)
    assert "<string>" in run_dir.stack(1).read_text()
    assert gaps == {1: "Flight Recorder dump"}  # it never loaded torch
    verdict = watch._judge()
    assert watch._look.facts.alive == {0: True, 1: True}
    assert verdict.verdict != "crash"
    assert not others.any_ended()
    rank.kill()
    rank.wait()
    wait_for(others.any_ended)
    verdict = watch._judge()
    assert (verdict.verdict, verdict.culprits) == ("crash", (1,))


def test_a_decided_run_is_ended_there_and_an_expired_status_is_not_used(elsewhere, monkeypatch):
    run_dir, rank = elsewhere
    others = RemoteHosts(run_dir, Host())
    wait_for(others.statuses)
    write_json(run_dir.verdict, {})
    assert rank.wait(timeout=60) == -signal.SIGKILL
    monkeypatch.setattr("repro.hosts.agent.STATUS_EXPIRY_S", 1.0)
    wait_for(lambda: not others.statuses())
    (sentence,) = others.silent()
    assert sentence.startswith("the agent of rank 1 sent its last status")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["7"], "7 is not one of the 2 ranks"),
        (["1", "--end"], "cannot be combined with --end"),
        (["1"], "the run already has a verdict"),
    ],
)
def test_a_lookout_that_makes_no_sense_is_refused_in_one_line(tmp_path, capsys, options, words):
    run_dir = prepare_run_dir(tmp_path, SETTINGS)
    if words == "the run already has a verdict":
        write_json(run_dir.verdict, {})
    before = set(run_dir.root.iterdir())
    assert main(["watch", str(run_dir.root), "--agent", *options]) == USAGE
    assert words in capsys.readouterr().err
    assert set(run_dir.root.iterdir()) == before


HOSTS = """
ip link set lo up || exit 77
for n in 1 2; do
    unshare --uts --pid --fork --mount-proc --kill-child sh -c "hostname host$n; exec \\
        {python} -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --max-restarts=0 --monitor-interval=0.1 \\
        --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:29400 --rdzv-id=hang --local-addr=127.0.0.$n \\
        -m repro.worker {arguments} --out {out}" > {out}/host$n.log 2>&1 &
    pids="$pids $!"
done
for pid in $pids; do wait $pid; codes="$codes $?"; done
echo $codes > {out}/codes
"""
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]


@pytest.fixture
def two_hosts(tmp_path):
    """Starts four ranks of a scenario on two hosts; afterwards everything is ended."""
    if subprocess.run([*NAMESPACES, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("namespaces: this user cannot make them here, or there is no unshare or ip")
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        script = HOSTS.format(python=sys.executable, arguments=" ".join(arguments), out=tmp_path)
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        started.append(subprocess.Popen([*NAMESPACES, "bash", "-c", script], cwd=ROOT, env=environment))
        return started[0]

    yield start
    for process in started:
        process.kill()  # and the kernel all that is in its namespaces
        process.wait()


def verdict_of(out: Path, patience_s: float = 90.0) -> tuple[Path, dict]:
    def written():
        return list(out.glob("2*/verdict.json"))

    wait_for(written, patience_s)
    return written()[0].parent, json.loads(written()[0].read_text())


def rank_process(out: Path, rank: int) -> psutil.Process:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(out) in " ".join(process.cmdline()) and process.environ().get("RANK") == str(rank):
                return process
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.full
@pytest.mark.timeout(200)
def test_a_hang_over_two_hosts_leaves_the_stacks_of_all_ranks(two_hosts, tmp_path):
    two_hosts("metadata_rebuild", "--variant", "fault")
    run_dir, verdict = verdict_of(tmp_path)
    assert (verdict["verdict"], verdict["cause"], verdict["matches_expected"]) == ("deadlock", "extra", True), verdict
    assert verdict["system"]["alive"] == {str(rank): True for rank in range(4)}
    for rank in range(4):
        assert "hybrid_moe_ref" in (run_dir / f"stacks/rank{rank:03d}.txt").read_text(), f"rank {rank}"
        assert (run_dir / f"fr/rank{rank:03d}.json").stat().st_size, f"rank {rank}"
    for rank in range(4):
        wait_for(lambda rank=rank: not _lives(tmp_path, rank))
    assert not (run_dir / "agents").exists()


@pytest.mark.full
@pytest.mark.timeout(200)
def test_a_rank_that_is_killed_on_the_second_host_is_named(two_hosts, tmp_path):
    two_hosts("metadata_rebuild", "--variant", "control", "--deadline", "100")
    wait_for(lambda: list(tmp_path.glob("2*/outputs")) and _lives(tmp_path, 3), 60)
    wait_for(lambda: _serves(tmp_path, 3), 60)
    rank_process(tmp_path, 3).kill()
    _, verdict = verdict_of(tmp_path)
    assert (verdict["verdict"], verdict["culprits"]) == ("crash", [3]), verdict["evidence"]


@pytest.mark.full
@pytest.mark.timeout(200)
def test_ranks_on_two_hosts_that_finish_exit_well(two_hosts, tmp_path):
    process = two_hosts("metadata_rebuild", "--variant", "control")
    _, verdict = verdict_of(tmp_path)
    assert verdict["verdict"] == "clean", verdict["evidence"]
    process.wait(timeout=90)
    assert (tmp_path / "codes").read_text().split() == ["0", "0"]


def _lives(out: Path, rank: int) -> bool:
    try:
        return rank_process(out, rank).is_running()
    except AssertionError:
        return False


def _serves(out: Path, rank: int) -> bool:
    from repro.trace.witness.file import Tail
    from repro.trace.witness.parse import WitnessError

    with contextlib.suppress(OSError, WitnessError, IndexError):
        event = Tail(next(out.glob("2*")) / f"events/rank{rank:03d}.wit").last_event()
        return event is not None and event.step >= 1
    return False
