"""Kernels that are compiled where they run: what they compute, who builds them, and what a cold cache looks like."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from building import place, small
from forked import run_forked
from hybrid_moe_kernels.build_lock import BuildLock
from hybrid_moe_kernels.extension import BATON, Extension, has_baton
from hybrid_moe_kernels.gated_delta_rule import reference as gdn_reference
from hybrid_moe_kernels.lab import gdn_prefill, moe_experts
from hybrid_moe_kernels.moe import reference as moe_reference
from written import written

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.startup.builds import ensure
from repro.lab import scenarios
from repro.lab.outcome.second_judgement import judge_again
from repro.lab.settings import RunSettings
from repro.trace.witness.file import read
from repro.trace.witness.format import Kind

pytestmark = pytest.mark.timeout(300)  # one run compiles, on machines that may have other things to do
needs_a_baton = pytest.mark.skipif(not has_baton(), reason="since torch 2.14, the loader's lock ends with its holder")


@pytest.fixture
def loaded(cold_run):
    for extension in (gdn_prefill.PREFILL, moe_experts.EXPERTS):
        ensure(extension, place(os.environ["HMR_KERNEL_CACHE"]))
    yield
    for extension in (gdn_prefill.PREFILL, moe_experts.EXPERTS):
        extension._loaded.clear()  # ranks that are forked later must meet them as a new process does


# -- what they compute ----------------------------------------


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
    got = gdn_prefill.prefill(*args, ours, slots, starts)
    want = gdn_reference.prefill(*args, theirs, slots, starts)
    for one, two in ((got, want), (ours, theirs)):
        assert (one - two).norm() <= limit * two.norm(), f"seed {seed}"


def test_head_sizes_that_no_function_is_made_for_are_named(loaded):
    x = torch.zeros(3, 1, 24)
    with pytest.raises(ValueError, match=r"gdn_prefill: there is no function for heads of K = 24, V = 24"):
        gdn_prefill.prefill(
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
        for rows in moe_experts.BLOCK_ROWS:
            moe_experts.use_block_rows(rows)
            got = moe_experts.experts(x, weights, ids, gate_up, down)
            assert (got - want).norm() <= limit * want.norm(), rows
    finally:
        moe_experts.use_block_rows(4)


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


# -- the three scenarios ----------------------------------------


def test_a_cold_build_in_the_first_step_is_slow_and_names_builder_lock_and_time(cold_run):
    run_dir, document, noticed, _ = cold_run
    assert not any(line.startswith("deadlock") for line in noticed), noticed
    if document["verdict"] == "clean":  # the silence of a builder that lacks a processor is no evidence, and says so
        slow = [line for line in noticed if line.startswith("slow: ")]
        assert any("building for" in line for line in slow) and any("lacked a processor" in line for line in slow), slow
        return
    assert document["verdict"] == "slow" and document["matches_expected"], document
    (builder,) = document["culprits"]
    # Whichever took longer just now; the wait for the other one is a line of the evidence too.
    text = " ".join(line for line in document["evidence"] if not line.startswith("another wait of"))
    module = next(name for name in ("gdn_prefill", "moe_experts") if name in text)
    assert f"rank {builder} building for " in text and f": {module}" in text and f"lock {cold_run[3]}/" in text, text
    assert text.count(f"rank {builder} holds lock") == 1
    others = {position["rank"]: position for position in document["ranks"] if position["rank"] != builder}
    assert {position["state"] for position in others.values()} == {"locked"}, document
    # A rank that comes when the lock is free again begins too, and ninja finds nothing to do: not always the first.
    assert builder in {rank for _, rank in builds_begun(run_dir, module)}


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
    again = written(judge_again(run_dir, settings)[0])
    assert (again["verdict"], again["cause"], again["culprits"]) == ("deadlock", "lock", [culprit])


@pytest.mark.full
def test_a_lock_released_before_the_ranks_agree_is_clean(cold_run, tmp_path):
    _, document = run_forked(small("lock_across_collective", "fix", kernel_cache="warm"), tmp_path)
    assert document["verdict"] == "clean" and document["matches_expected"], document


@needs_a_baton
@pytest.mark.full
def test_a_lock_file_of_a_killed_builder_is_a_deadlock_that_blames_no_rank(cold_run, tmp_path):
    settings = small("stale_baton", kernel_cache="warm")
    run_dir, document = run_forked(settings, tmp_path)
    assert document["matches_expected"], document
    assert (document["verdict"], document["cause"], document["culprits"]) == ("deadlock", "lock", []), document
    assert any(f"no process holds lock {run_dir.cache}" in line for line in document["evidence"]), document["evidence"]
    again = written(judge_again(run_dir, settings)[0])
    assert (again["verdict"], again["cause"]) == ("deadlock", "lock")


@needs_a_baton
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
    assert logs.count("its holder has ended") == 1, logs
