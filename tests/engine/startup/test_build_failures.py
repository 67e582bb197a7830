"""What goes wrong when kernels are built: the lock, compilers, folders. Every rank stops with the first error and its
rank, and nothing is left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from building import place, small
from ended import has_ended
from folders import mounted, read_only
from hybrid_moe_kernels import extension as extensions
from hybrid_moe_kernels.build_lock import BuildLock
from hybrid_moe_kernels.extension import Extension
from hybrid_moe_kernels.lab import gdn_prefill
from ranks import run_ranks

from hybrid_moe_ref.engine.lifecycle import Engine, PrepareFailed
from hybrid_moe_ref.engine.startup import builds
from hybrid_moe_ref.engine.startup.builds import ensure
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch
from repro.exit_codes import CANNOT_TELL
from repro.lab import scenarios
from repro.lab.rank import worker
from repro.lab.settings import RunSettings
from repro.lab.start.kernel_cache import CannotFill
from repro.lab.start.prepare import prepare_run_dir

pytestmark = pytest.mark.timeout(300)  # one run compiles, on machines that may have other things to do

STOP_S = 20.0
"""All ranks must have stopped so soon after the first of them failed."""


def start_and_catch(tmp_path, cache, sabotage, num_ranks=3, gdn="jit"):
    """Start a server on forked ranks; return the message that all got, which must be the same.

    No rank may stop long after another.
    """
    model = {"layer_pattern": "G", "vocab_size": 64, "num_experts": 12, "num_experts_per_tok": 2}
    engine = {"gdn_prefill_backend": gdn, "cache_dir": str(cache)}
    settings = RunSettings.from_document(
        {"num_ranks": num_ranks, "model": model, "engine": engine}, {"scenario": "cold_jit"}, ""
    )

    def run(rank, store):
        comm = Communicator.connect(settings.server().parallel, rank, store=store, timeout_s=60)
        sabotage(rank)
        try:
            Engine(settings.server(), comm)
        except PrepareFailed as error:
            return str(error), time.monotonic()
        return "started", time.monotonic()

    results = run_ranks(num_ranks, tmp_path, run)
    assert len({message for message, _ in results}) == 1, results
    stopped = [at for _, at in results]
    assert max(stopped) - min(stopped) < STOP_S, results
    return results[0][0]


def fake_compiler(tmp_path, text):
    path = tmp_path / "c++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def leftovers(cache):
    """Files of a kernel cache, and processes that run in it, as compilers do; the killed get some time to end."""
    deadline = time.monotonic() + 60
    while (found := _of_builds(cache)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _of_builds(cache):
    found = [path for path in (Path(cache) / "kernels").rglob("*") if path.is_file()]
    for running in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if running.cwd().startswith(str(cache)):
                found.append(running)
    return found


def leads(rank, leader, marker):
    """Let one rank come to the lock first, so that it is the one that builds."""
    if rank == leader:
        acquire = BuildLock._try

        def first(self):
            mine = acquire(self)
            marker.touch()
            return mine

        BuildLock._try = first
    else:
        prepare = Engine._prepare

        def later(self):
            wait_for(marker)
            prepare(self)

        Engine._prepare = later


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "not found"),
        (
            'case "$*" in *prefill.cpp*) echo "p.cpp:1: fatal error: no such header" >&2; exit 1;; esac; exec c++ "$@"',
            "p.cpp:1: fatal error: no such header",
        ),
        ("kill -9 $$", ""),
    ],
)
def test_a_compiler_that_is_missing_or_fails_on_one_rank_stops_all_with_its_words(tmp_path, compiler, words):
    path = fake_compiler(tmp_path, compiler) if compiler else "/nowhere/c++"

    def sabotage(rank):
        leads(rank, 1, tmp_path / "leader")
        if rank == 1:
            os.environ["CXX"] = path

    message = start_and_catch(tmp_path, tmp_path / "cache", sabotage)
    assert message.startswith("rank 1 could not prepare: BuildFailed: gdn_prefill could not be built: "), message
    assert words in message and "\n" not in message, message
    assert not leftovers(tmp_path / "cache")


def test_a_rank_that_raises_while_another_builds_ends_the_build(tmp_path):
    compiler = fake_compiler(
        tmp_path, f"echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/compiler; exec sleep 300"
    )

    def sabotage(rank):
        os.environ["CXX"] = compiler
        if rank == 2:

            def fail(self):
                wait_for(tmp_path / "compiler")
                raise MemoryError("no room for the state")

            ModelRunner.warm_up = fail
            gdn_prefill.PREFILL._loaded.append(None)  # it has nothing to build, so it comes to its warm-up

    message = start_and_catch(tmp_path, tmp_path / "cache", sabotage)
    assert message == "rank 2 could not prepare: MemoryError: no room for the state"
    assert has_ended(int((tmp_path / "compiler").read_text()))
    assert not leftovers(tmp_path / "cache")


def test_a_build_that_does_not_end_when_it_is_asked_to_is_left_behind(tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(builds, "END_S", 0.2)
    monkeypatch.setattr(Extension, "load", lambda self, cache, tell: over.wait())
    try:
        with pytest.raises(ScheduleMismatch, match="rank 1 is out of memory"):
            ensure(Extension("endless", ()), place(tmp_path, stopped_by=lambda: "rank 1 is out of memory"))
    finally:
        over.set()


@pytest.mark.full
def test_a_builder_that_is_killed_takes_its_compilers_with_it(tmp_path):
    sleeps = (
        f'case "$*" in *prefill.cpp*) echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/compiler; exec sleep 300'
    )
    compiler = fake_compiler(tmp_path, f'{sleeps};; esac; exec c++ "$@"')
    code = (
        f"from pathlib import Path; from {gdn_prefill.__name__} import PREFILL; PREFILL.load(Path({str(tmp_path)!r}))"
    )
    builder = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CXX": compiler})
    try:
        wait_for(tmp_path / "compiler")
    finally:
        builder.kill()
        builder.wait()
    assert has_ended(int((tmp_path / "compiler").read_text()))


def test_what_a_build_lacks_is_named_and_ninja_is_found_beside_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "c++ -pipe")
    assert "there is no C++ compiler c++" in extensions.missing()
    fake_compiler(tmp_path, "exit 0")
    assert "ninja, which is not installed" in extensions.missing()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ninja").write_text("#!/bin/sh\necho 1.11\n")
    (tmp_path / "bin" / "ninja").chmod(0o755)
    assert not extensions.missing()
    with extensions.loader() as cpp_extension:
        assert cpp_extension.is_ninja_available()
    assert os.environ["PATH"] == str(tmp_path)
    for name in ("cold_jit", "stale_baton", "lock_across_collective", "config1"):
        monkeypatch.setenv("CXX", "/nowhere/c++")
        assert "/nowhere/c++" in scenarios.load(name).missing(scenarios.settings_of({"scenario": name}))
    assert not scenarios.load("tp8").missing(scenarios.settings_of({"scenario": "tp8"})), "it compiles nothing"
    on_gpus = scenarios.settings_of({"scenario": "config2", "backend": "nccl"})
    assert "C++ for a CPU" in scenarios.load("config2").missing(on_gpus)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["cold_jit"], "cold_jit: kernels are compiled on this machine, but there is no C++ compiler /nowhere/c++"),
        (
            ["metadata_rebuild", "--backend", "nccl"],
            "--backend nccl needs a GPU for each of 2 ranks of a host, but this host has 0",
        ),
    ],
)
def test_under_plain_torchrun_what_cannot_run_here_is_reported_before_the_ranks_meet(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CXX": "/nowhere/c++"}.items():
        monkeypatch.setenv(name, value)
    assert worker.main(argv) == CANNOT_TELL
    assert words in capsys.readouterr().err


def test_a_user_s_folder_that_is_filled_is_no_cold_cache(tmp_path):
    built = tmp_path / "cache" / "kernels" / "gdn_prefill-0123" / "built"
    built.parent.mkdir(parents=True)
    built.write_text("")
    with pytest.raises(CannotFill, match=r"cold start is not possible, because .*/cache/kernels contains"):
        prepare_run_dir(tmp_path / "runs", small("cold_jit", cache_dir=tmp_path / "cache"))
    assert not list((tmp_path / "runs").iterdir())


def test_a_warm_cache_that_is_not_built_by_the_deadline_is_given_up(tmp_path):
    with pytest.raises(CannotFill, match=r"not built within 0.1 s"):
        prepare_run_dir(tmp_path, small("cold_jit", kernel_cache="warm", deadline_s=0.1))


def test_a_warm_cache_is_not_waited_for_by_a_user_who_has_had_enough(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare_run_dir(tmp_path, small("cold_jit", kernel_cache="warm"), lambda: True)
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_user_s_folder_may_be_filled_again_and_again(cold_run, tmp_path):
    for _ in range(2):
        prepare_run_dir(tmp_path / "runs", small("cold_jit", kernel_cache="warm", cache_dir=tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "kernels").glob("*/built"))) == 2


def test_a_read_only_cache_stops_all_ranks_and_names_the_folder(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with read_only(cache):
        message = start_and_catch(tmp_path, cache, lambda rank: None)
    assert re.search(
        rf"cannot build in {cache}/kernels: (Read-only file system|Permission denied); choose another", message
    )


def test_a_full_cache_stops_all_ranks_and_leaves_nothing(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with mounted(cache, "-o", "size=64k"):
        (cache / "kernels").mkdir()
        with pytest.raises(OSError), (cache / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        message = start_and_catch(tmp_path, cache, lambda rank: None)
        assert "could not prepare: BuildFailed: " in message and "no space left" in message.lower(), message
        assert not leftovers(cache)


def test_a_file_system_without_locks_stops_all_ranks_and_names_the_folder(tmp_path):
    """No such file system can be mounted everywhere, so the system call answers as one would."""

    def sabotage(rank):
        def flock(descriptor, how):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = flock

    message = start_and_catch(tmp_path, tmp_path / "cache", sabotage)
    assert (
        f"BuildFailed: cannot build in {tmp_path}/cache/kernels: No locks available; choose another folder" in message
    )
    assert not leftovers(tmp_path / "cache")


def test_a_warm_cache_needs_neither_compiler_nor_lock_nor_permission_to_write(cold_run, tmp_path):
    def sabotage(rank):
        os.environ["PATH"] = "/nowhere"
        fcntl.flock = None

    message = start_and_catch(tmp_path, Path(os.environ["HMR_KERNEL_CACHE"]).parent, sabotage)
    assert message == "started"
