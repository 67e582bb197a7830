"""Kernels that are compiled where they run: what they compute, who builds them, and what a cold cache looks like.

One run compiles for all tests of this file; the others find a warm cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from folders import mounted, read_only
from forked import run_forked
from hybrid_moe_kernels import extension as extensions
from hybrid_moe_kernels.extension import BATON, Extension
from hybrid_moe_kernels.gated_delta_rule import jit as gdn_jit
from hybrid_moe_kernels.gated_delta_rule import reference as gdn_reference
from hybrid_moe_kernels.moe import jit as moe_jit
from hybrid_moe_kernels.moe import reference as moe_reference
from ranks import run_ranks

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine import builds
from hybrid_moe_ref.engine.build_lock import BuildLock, LockTimeout
from hybrid_moe_ref.engine.builds import BuildPlace, ensure, who_has_open
from hybrid_moe_ref.engine.lifecycle import Engine, PrepareFailed
from hybrid_moe_ref.engine.runner import ModelRunner
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.guard import ScheduleMismatch
from hybrid_moe_ref.parallel.observer import NullObserver
from repro import launch, matrix, process, scenarios, worker
from repro.cli import CANNOT_TELL, USAGE, main
from repro.kernel_cache import CannotFill
from repro.layout import Kind
from repro.settings import RunSettings
from repro.watch import judge_again
from repro.witness import read

pytestmark = pytest.mark.timeout(300)  # one run compiles, on machines that may have other things to do

STOP_S = 5.0
"""All ranks must have stopped so soon after the first of them failed."""


def small(name, variant="fault", num_ranks=4, cache_dir="", **flags):
    """A run on four ranks and four layers; ``cache_dir`` outlives it."""
    engine = {"unfinished_interval": 16, "cache_dir": str(cache_dir)}
    document = {"num_ranks": num_ranks, "model": {"layer_pattern": "GMAG"}, "engine": engine}
    return scenarios.settings_of({"scenario": name, "variant": variant, **flags}, document)


@pytest.fixture(scope="session")
def cold_run(tmp_path_factory):
    """The one run that compiles: its directory, verdict and notices. Its cache is the warm one of the others."""
    out, noticed = tmp_path_factory.mktemp("cold"), []
    run_dir, document = run_forked(small("cold_jit", cache_dir=out / "cache"), out, notice=noticed.append)
    os.environ["HMR_KERNEL_CACHE"] = str(out / "cache" / "kernels")
    yield run_dir, document, noticed, out / "cache" / "kernels"
    del os.environ["HMR_KERNEL_CACHE"]


@pytest.fixture
def loaded(cold_run):
    for extension in (gdn_jit.PREFILL, moe_jit.EXPERTS):
        ensure(extension, place(os.environ["HMR_KERNEL_CACHE"]))
    yield
    for extension in (gdn_jit.PREFILL, moe_jit.EXPERTS):
        extension._loaded.clear()  # ranks that are forked later must meet them as a new process does


def place(cache, rank=0, **options):
    return BuildPlace(Path(cache), rank, NullObserver(), **options)


# -- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("seed", range(3))
def test_the_compiled_prefill_computes_the_gated_delta_rule(loaded, dtype, limit, seed):
    r = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=r, dtype=dtype)

    M, H, K, V = 2, 4, (16, 32, 64)[seed], (64, 16, 32)[seed]
    starts, slots = torch.tensor([0, 20, 20, 61]), torch.tensor([3, 0, 1])
    args = (draw(61, M, K), draw(61, M, K), draw(61, H, V), -draw(61, H).abs(), draw(61, H).sigmoid())
    ours, theirs = (draw(5, H, K, V) for _ in range(2))
    theirs.copy_(ours)
    got = gdn_jit.prefill(*args, ours, slots, starts)
    want = gdn_reference.prefill(*args, theirs, slots, starts)
    for one, two in ((got, want), (ours, theirs)):
        assert (one - two).norm() <= limit * two.norm(), f"seed {seed}"


def test_head_sizes_that_no_function_is_made_for_are_named(loaded):
    x = torch.zeros(3, 1, 24)
    with pytest.raises(ValueError, match=r"gdn_prefill: not made for heads of K = 24, V = 24"):
        gdn_jit.prefill(
            x, x, x, x[..., 0], x[..., 0], torch.zeros(1, 1, 24, 24), torch.tensor([0]), torch.tensor([0, 3])
        )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_the_compiled_experts_compute_the_mixture_for_any_block_of_rows(loaded, dtype, limit):
    r = torch.Generator().manual_seed(0)
    x, weights = torch.randn(50, 32, generator=r, dtype=dtype), torch.rand(50, 4, generator=r, dtype=dtype)
    ids = torch.randint(-3, 11, (50, 4), generator=r)
    gate_up, down = torch.randn(8, 32, 32, generator=r, dtype=dtype), torch.randn(8, 32, 16, generator=r, dtype=dtype)
    want = moe_reference.experts(x, weights, ids, gate_up, down)
    try:
        for rows in moe_jit.BLOCK_ROWS:
            moe_jit.use_block_rows(rows)
            got = moe_jit.experts(x, weights, ids, gate_up, down)
            assert (got - want).norm() <= limit * want.norm(), rows
    finally:
        moe_jit.use_block_rows(4)


def test_a_change_of_a_source_a_header_a_flag_or_the_place_is_another_module(tmp_path):
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    source.write_text("1")
    header.write_text("1")
    folders = set()
    for text, flag in (("1", "-O3"), ("2", "-O3"), ("2", "-O2")):
        header.write_text(text)
        folders.add(Extension("a", (source,), (header,), (flag,)).folder(tmp_path))
    (tmp_path / "clone").mkdir()
    moved = shutil.copy(source, tmp_path / "clone")
    folders.add(Extension("a", (Path(moved),), (header,), (flag,)).folder(tmp_path))
    assert len(folders) == 4


def test_a_backend_that_cannot_run_here_is_refused_by_name():
    with pytest.raises(ConfigError, match="unknown backend 'cuda'; known: auto, torch, triton, jit"):
        RunSettings.from_document({"engine": {"gdn_prefill_backend": "cuda"}}, {"scenario": "cold_jit"}, "")
    with pytest.raises(ConfigError, match="'jit' computes in float32 and float64, not in dtype bfloat16"):
        RunSettings.from_document({"engine": {"moe_backend": "jit", "dtype": "bfloat16"}}, {"scenario": "cold_jit"}, "")


# -- the three scenarios -------------------------------------------------------------------------------------------


def test_a_cold_build_in_the_first_step_is_slow_and_names_builder_lock_and_time(cold_run):
    run_dir, document, noticed, _ = cold_run
    assert document["verdict"] == "slow" and document["matches_expected"], document
    assert not any(line.startswith("deadlock") for line in noticed), noticed
    (builder,) = document["culprits"]
    told = " ".join(document["evidence"])
    module = next(name for name in ("gdn_prefill", "moe_experts") if name in told)  # whichever took longer just now
    assert f"rank {builder} building for " in told and f": {module}" in told and f"lock {cold_run[3]}/" in told, told
    assert told.count(f"is with rank {builder}") == 1
    others = {position["rank"]: position for position in document["ranks"] if position["rank"] != builder}
    assert {position["state"] for position in others.values()} == {"locked"}, document
    first = min(builds_begun(run_dir, module))
    assert first[1] == builder, "the rank that began first builds; who comes after it finds all done"


def builds_begun(run_dir, module):
    """(when, rank) of each beginning of a build, by the witnesses."""
    witnesses = [read(run_dir.witness(rank)) for rank in range(4)]
    return [
        (event.t_ns, witness.rank)
        for witness in witnesses
        for event in witness.events()
        if event.kind == Kind.BUILD_BEGIN and witness.text(event.sig) == module
    ]


@pytest.mark.full
@pytest.mark.parametrize("name", ["cold_jit", "compile_skew", "straggler"])
@pytest.mark.parametrize("quiet_window_s", [1.0, 1.5, 3.0])
def test_what_is_slow_is_never_a_deadlock_at_any_quiet_window(tmp_path, name, quiet_window_s):
    settings, noticed = small(name, quiet_window_s=quiet_window_s), []
    if missing := scenarios.load(name).missing(settings):
        pytest.skip(missing)
    _, document = run_forked(settings, tmp_path, notice=noticed.append)
    assert document["verdict"] in ("slow", "clean") and document["matches_expected"], document
    assert not any(line.startswith("deadlock") for line in noticed), noticed


@pytest.mark.full
@pytest.mark.parametrize("variant", ["control", "fix"])
def test_on_a_warm_cache_the_same_server_is_clean(cold_run, tmp_path, variant):
    _, document = run_forked(small("cold_jit", variant, kernel_cache="warm"), tmp_path)
    assert document["verdict"] == "clean" and document["matches_expected"], document


@pytest.mark.full
def test_built_before_the_first_collective_a_cold_start_is_clean(tmp_path):
    run_dir, document = run_forked(small("cold_jit", "fix"), tmp_path)
    assert document["verdict"] == "clean" and document["matches_expected"], document
    assert len(builds_begun(run_dir, "gdn_prefill")) == len(builds_begun(run_dir, "moe_experts")) == 1


@pytest.mark.full
def test_one_cold_rank_lets_the_others_wait_and_a_short_group_timeout_fails_them(cold_run, tmp_path):
    settings = small("cold_jit", num_ranks=2, kernel_cache="split", group_timeout_s=3.0)
    settings = dataclasses.replace(settings, engine=dataclasses.replace(settings.engine, moe_backend="auto"))
    _, document = run_forked(settings, tmp_path)
    assert (document["verdict"], document["cause"]) == ("crash", "error") and document["matches_expected"], document


@pytest.mark.full
@pytest.mark.parametrize("checks", ["observe", "agree"])
def test_a_lock_held_into_a_collective_is_a_deadlock_of_its_holder(cold_run, tmp_path, checks):
    settings = small("lock_across_collective", kernel_cache="warm", checks=checks, cache_dir=tmp_path / "cache")
    run_dir, document = run_forked(settings, tmp_path)
    assert document["matches_expected"], document
    if checks == "agree":
        assert (document["verdict"], document["cause"]) == ("crash", "error"), document
        return
    assert (document["verdict"], document["cause"]) == ("deadlock", "lock"), document
    (culprit,) = document["culprits"]
    lock = BuildLock(tmp_path / "cache" / "kernels" / "experts.lock", 0, 1.0)
    assert lock.holder().rank == culprit, "the lock's file names the holder, independently of the witnesses"
    again, _ = judge_again(run_dir, settings)
    assert (again["verdict"], again["cause"], again["culprits"]) == ("deadlock", "lock", [culprit])


@pytest.mark.full
def test_a_lock_released_before_the_ranks_agree_is_clean(cold_run, tmp_path):
    _, document = run_forked(small("lock_across_collective", "fix", kernel_cache="warm"), tmp_path)
    assert document["verdict"] == "clean" and document["matches_expected"], document


@pytest.mark.full
def test_a_lock_file_of_a_killed_builder_is_a_deadlock_that_blames_no_rank(cold_run, tmp_path):
    settings = small("stale_baton", kernel_cache="warm")
    run_dir, document = run_forked(settings, tmp_path)
    assert document["matches_expected"], document
    assert (document["verdict"], document["cause"], document["culprits"]) == ("deadlock", "lock", []), document
    assert any(f"nobody holds lock {run_dir.cache}" in line for line in document["evidence"]), document["evidence"]
    again, _ = judge_again(run_dir, settings)
    assert (again["verdict"], again["cause"]) == ("deadlock", "lock")


@pytest.mark.full
def test_the_cure_removes_a_lock_file_whose_holder_is_gone(cold_run, tmp_path):
    def forget(folder):
        (folder / "built").unlink()  # as in a build that was interrupted

    settings = small("stale_baton", "fix", kernel_cache="warm", cache_dir=tmp_path / "cache")
    run_dir, document = run_forked(
        settings,
        tmp_path,
        before=lambda run_dir: [forget(folder) for folder in (tmp_path / "cache" / "kernels").glob("gdn_prefill-*")],
    )
    assert document["verdict"] == "clean" and document["matches_expected"], document
    assert not list((tmp_path / "cache" / "kernels").glob(f"*/{BATON}"))
    logs = "".join(run_dir.log(rank).read_text() for rank in range(4))
    assert logs.count("its holder is gone") == 1, logs


# -- the lock ------------------------------------------------------------------------------------------------------


def hold(path, rank, until):
    """A process that holds the lock, alive or dead when this returns."""
    code = f"""
import sys, time
from pathlib import Path
from hybrid_moe_ref.engine.build_lock import BuildLock
with BuildLock(Path({str(path)!r}), {rank}, 1.0) as lock:
    print("held", flush=True)
    while True:
        {until}
        time.sleep(0.05)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_who_waits_for_the_lock_is_told_whom_for_and_since_when(tmp_path):
    holder = hold(tmp_path / "lock", 3, "lock.beat()")
    told = []
    try:
        with (
            pytest.raises(
                LockTimeout, match=rf"held by rank 3 \(pid {holder.pid} on .*\), for .* s; last sign of life"
            ),
            BuildLock(tmp_path / "lock", 0, 0.7, lambda *event: told.append(event)),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert told[0] == ("lock_wait", str(tmp_path / "lock"), holder.pid)
    assert ("heartbeat", "waits for lock of rank 3", -1) in told


def test_a_holder_that_gives_no_sign_of_life_is_not_waited_for_until_the_deadline(tmp_path):
    holder = hold(tmp_path / "lock", 3, "pass")
    started = time.monotonic()
    try:
        with pytest.raises(LockTimeout, match="last sign of life"), BuildLock(tmp_path / "lock", 0, 60.0, stale_s=0.5):
            pass
    finally:
        holder.kill()
        holder.wait()
    assert time.monotonic() - started < 10


def test_the_lock_of_a_killed_holder_is_had_at_once_and_leaves_nothing(tmp_path):
    holder = hold(tmp_path / "lock", 3, "lock.beat()")
    holder.kill()
    holder.wait()
    assert (tmp_path / "lock").exists()
    with BuildLock(tmp_path / "lock", 0, 0.5) as lock:
        assert (lock.holder().rank, lock.holder().pid) == (0, os.getpid())
    assert not (tmp_path / "lock").exists()


def test_who_has_a_file_open_is_found_and_nobody_is_certain(tmp_path):
    path = tmp_path / "lock"
    path.write_text("")
    holder = subprocess.Popen(
        [sys.executable, "-c", f"f = open({str(path)!r}); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert who_has_open(path) == holder.pid
    holder.kill()
    holder.communicate()
    assert who_has_open(path) == 0
    assert who_has_open(tmp_path / "none") == 0


# -- bad input: every rank stops with the first error and its rank, and nothing is left --------------------------------


def start_and_catch(tmp_path, cache, sabotage, num_ranks=3, gdn="jit"):
    """Start a server on forked ranks; what all were told, which must be the same. None stops long after another."""
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
    assert len({told for told, _ in results}) == 1, results
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
    deadline = time.monotonic() + 5
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
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "not found"),
        (
            'case "$*" in *jit.cpp*) echo "jit.cpp:1: fatal error: no such header" >&2; exit 1;; esac; exec c++ "$@"',
            "jit.cpp:1: fatal error: no such header",
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

    told = start_and_catch(tmp_path, tmp_path / "cache", sabotage)
    assert told.startswith("rank 1 could not prepare: BuildFailed: gdn_prefill could not be built: "), told
    assert words in told and "\n" not in told, told
    assert not leftovers(tmp_path / "cache")


def test_a_rank_that_raises_while_another_builds_ends_the_build(tmp_path):
    compiler = fake_compiler(tmp_path, f"echo $$ > {tmp_path}/compiler; exec sleep 300")

    def sabotage(rank):
        os.environ["CXX"] = compiler
        if rank == 2:

            def fail(self):
                wait_for(tmp_path / "compiler")
                raise MemoryError("no room for the state")

            ModelRunner.warm_up = fail
            gdn_jit.PREFILL._loaded.append(None)  # it has nothing to build, so it comes to its warm-up

    told = start_and_catch(tmp_path, tmp_path / "cache", sabotage)
    assert told == "rank 2 could not prepare: MemoryError: no room for the state"
    compiler_pid = int((tmp_path / "compiler").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(compiler_pid, 0)
    assert not leftovers(tmp_path / "cache")


def test_a_build_that_does_not_end_when_it_is_told_to_is_left_behind(tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(builds, "END_S", 0.2)
    monkeypatch.setattr(Extension, "load", lambda self, cache, tell: over.wait(60))
    started = time.monotonic()
    with pytest.raises(ScheduleMismatch, match="rank 1 is out of memory"):
        ensure(Extension("endless", ()), place(tmp_path, heard=lambda: "rank 1 is out of memory"))
    assert time.monotonic() - started < 30
    over.set()


@pytest.mark.full
def test_a_builder_that_is_killed_takes_its_compilers_with_it(tmp_path):
    sleeps = f'case "$*" in *jit.cpp*) echo $$ > {tmp_path}/pid; mv {tmp_path}/pid {tmp_path}/compiler; exec sleep 300'
    compiler = fake_compiler(tmp_path, f'{sleeps};; esac; exec c++ "$@"')
    code = f"from pathlib import Path; from {gdn_jit.__name__} import PREFILL; PREFILL.load(Path({str(tmp_path)!r}))"
    builder = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CXX": compiler})
    try:
        wait_for(tmp_path / "compiler")
    finally:
        builder.kill()
        builder.wait()
    compiler_pid = int((tmp_path / "compiler").read_text())
    deadline = time.monotonic() + STOP_S
    while psutil.pid_exists(compiler_pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not psutil.pid_exists(compiler_pid)


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
        (["cold_jit"], "cold_jit: kernels are compiled, and there is no C++ compiler /nowhere/c++"),
        (
            ["metadata_rebuild", "--backend", "nccl"],
            "--backend nccl needs a GPU for each of 2 ranks of a host; 0 found",
        ),
    ],
)
def test_under_plain_torchrun_what_cannot_run_here_is_told_before_the_ranks_meet(monkeypatch, capsys, argv, words):
    monkeypatch.setattr(process, "die_with_parent", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "CXX": "/nowhere/c++"}.items():
        monkeypatch.setenv(name, value)
    assert worker.main(argv) == CANNOT_TELL
    assert words in capsys.readouterr().err


def test_a_user_s_folder_that_is_filled_is_no_cold_cache(tmp_path):
    built = tmp_path / "cache" / "kernels" / "gdn_prefill-0123" / "built"
    built.parent.mkdir(parents=True)
    built.write_text("")
    with pytest.raises(CannotFill, match=r"no cold start: .*/cache/kernels holds compiled kernels"):
        launch.prepare_run_dir(tmp_path / "runs", small("cold_jit", cache_dir=tmp_path / "cache"))
    assert not list((tmp_path / "runs").iterdir())


def test_a_warm_cache_that_is_not_built_by_the_deadline_is_given_up(tmp_path):
    with pytest.raises(CannotFill, match=r"not built within 0.1 s"):
        launch.prepare_run_dir(tmp_path, small("cold_jit", kernel_cache="warm", deadline_s=0.1))


@pytest.mark.full
def test_a_user_s_folder_may_be_filled_again_and_again(cold_run, tmp_path):
    for _ in range(2):
        launch.prepare_run_dir(tmp_path / "runs", small("cold_jit", kernel_cache="warm", cache_dir=tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "kernels").glob("*/built"))) == 2


def test_a_read_only_cache_stops_all_ranks_and_names_the_folder(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with read_only(cache):
        told = start_and_catch(tmp_path, cache, lambda rank: None)
    assert re.search(rf"cannot build in {cache}/kernels: (Read-only file system|Permission denied); name another", told)


def test_a_full_cache_stops_all_ranks_and_leaves_nothing(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with mounted(cache, "-o", "size=64k"):
        (cache / "kernels").mkdir()
        with pytest.raises(OSError), (cache / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        told = start_and_catch(tmp_path, cache, lambda rank: None)
        assert "could not prepare: BuildFailed: " in told and "no space left" in told.lower(), told
        assert not leftovers(cache)


def test_a_file_system_without_locks_stops_all_ranks_and_names_the_folder(tmp_path):
    """No such file system can be mounted everywhere, so the system call answers as one would."""

    def sabotage(rank):
        def flock(descriptor, how):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        fcntl.flock = flock

    told = start_and_catch(tmp_path, tmp_path / "cache", sabotage)
    assert f"BuildFailed: cannot build in {tmp_path}/cache/kernels: No locks available; name another folder" in told
    assert not leftovers(tmp_path / "cache")


def test_a_warm_cache_needs_neither_compiler_nor_lock_nor_permission_to_write(cold_run, tmp_path):
    def sabotage(rank):
        os.environ["PATH"] = "/nowhere"
        fcntl.flock = None

    told = start_and_catch(tmp_path, Path(os.environ["HMR_KERNEL_CACHE"]).parent, sabotage)
    assert told == "started"


# -- the report's configurations, and the matrix -------------------------------------------------------------------


def test_the_three_configurations_serve_the_same_requests_and_have_one_reference():
    runs = [scenarios.settings_of({"scenario": name}) for name in ("config1", "config2", "tp8")]
    assert len({run.reference_key() for run in runs}) == 1
    served = [sorted({request.request_id for requests in run.requests() for request in requests}) for run in runs]
    assert served[0] == served[1] == served[2] and len(served[0]) > 8
    assert [(run.tp_size, run.expert_parallel, run.engine.mode) for run in runs] == [
        (1, True, "graphs"), (1, True, "eager"), (8, False, "graphs")
    ]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", ["tp8", "config1"])
def test_tensor_and_expert_parallel_servers_give_the_tokens_of_one_process(cold_run, tmp_path, name):
    document = {"model": {"layer_pattern": "GMAG", "linear_num_value_heads": 8}}
    settings = scenarios.settings_of({"scenario": name, "variant": "control"}, document)
    _, verdict = run_forked(settings, tmp_path)
    assert verdict["verdict"] == "clean" and verdict["matches_expected"], verdict


def test_the_matrix_expects_a_stall_of_every_cold_build_and_of_nothing_else():
    found = {}
    for cell in matrix.cells():
        settings = cell.settings({}, {})
        found[cell] = scenarios.load(settings.scenario).expected(settings).verdict
    assert len(found) == 18
    for cell, verdict in found.items():
        builds = "jit" in (cell.gdn, cell.moe) and cell.cache != "warm"
        assert verdict == ("crash" if cell.group_timeout_s else "slow" if builds else "clean"), cell
    layouts = {layout: [v for cell, v in found.items() if cell.layout == layout and cell.cache != "split"]
               for layout in ("TP8", "DP8+EP8")}  # fmt: skip
    assert layouts["TP8"] == layouts["DP8+EP8"], "the stall follows the cold build, not the layout"


@pytest.mark.full
@pytest.mark.parametrize("cell", [c for c in matrix.cells() if c.cache == "split" or (c.gdn, c.moe) == ("jit", "jit")])
def test_a_cell_of_the_matrix_ends_as_it_expects(cold_run, tmp_path, cell):
    document = {"model": {"layer_pattern": "GMAG", "linear_num_value_heads": 8}}
    run_dir, verdict = run_forked(cell.settings(document, {}), tmp_path)
    assert verdict["matches_expected"], verdict
    for rank in range(8):
        told = matrix.phases(run_dir, rank)
        assert {"load", "prepare", "profile"} <= told.keys() and all(seconds >= 0 for seconds in told.values()), told


@pytest.mark.parametrize("argv", [["run", "cold_jit", "--variant", "all"], ["matrix", "--only", "TP8 jit cold"]])
def test_a_run_whose_cache_cannot_be_filled_costs_no_other_run_its_verdict(tmp_path, monkeypatch, capsys, argv):
    """The first one gets its verdict, and the others are told what this machine lacks."""

    def run(settings, out, *others):
        if done:
            raise CannotFill("no warm kernel cache: the disk is full")
        done.append(settings)
        run_dir = launch.prepare_run_dir(out, dataclasses.replace(settings, kernel_cache="cold"))
        return run_dir, {**launch.skipped(settings, ""), "verdict": "clean", "matches_expected": True, "ranks": []}

    done = []
    monkeypatch.setattr(launch, "run", run)
    assert main([*argv, "--out", str(tmp_path), "--json"]) == CANNOT_TELL
    told = capsys.readouterr()
    verdicts = [document["verdict"] for document in json.loads(told.out)]
    assert verdicts[0] == "clean" and set(verdicts[1:]) == {"inconclusive"} and len(verdicts) > 1
    assert "the disk is full" in told.err


def test_the_script_for_vllm_starts_every_combination_and_is_a_script(tmp_path):
    path = tmp_path / "matrix.sh"
    path.write_text(matrix.script())
    subprocess.run(["bash", "-n", path], check=True)
    starts = [line.split()[1:] for line in path.read_text().splitlines() if line.startswith("start ")]
    assert len(starts) == len({tuple(words) for words in starts}) == 24
    assert starts[0] == ["tp8", "triton", "triton", "cold"] and starts[1][-1] == "warm"


def test_a_cell_that_does_not_exist_is_one_line(capsys):
    assert main(["matrix", "--only", "TP9"]) == USAGE
    assert "--only: no cell has all of 'TP9'" in capsys.readouterr().err
