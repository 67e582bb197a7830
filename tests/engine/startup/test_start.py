"""The start of a server: ranks that differ or fail stop together, and an engine keeps to what it was started with."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
import torch
from diary import PHASES, SMALL
from hybrid_moe_kernels import extension as kernel_extension
from hybrid_moe_kernels import norm, registry
from ranks import run_ranks

from hybrid_moe_ref.config import ConfigError
from hybrid_moe_ref.engine.lifecycle import Engine, PrepareFailed
from hybrid_moe_ref.engine.policies import Ballot, Policies
from hybrid_moe_ref.engine.server_config import configuration_differences
from hybrid_moe_ref.engine.serving.scheduler import Request
from hybrid_moe_ref.engine.startup.builds import KernelBuilds
from hybrid_moe_ref.engine.step.runner import ModelRunner
from hybrid_moe_ref.layers.mixer import Mixer
from hybrid_moe_ref.layers.moe import Experts
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch
from hybrid_moe_ref.parallel.sharding.dispatch import ForwardContext
from repro.lab.settings import RunSettings


def start_and_catch(tmp_path, config_of, sabotage=lambda rank, engine_class: None):
    def run(rank, store):
        server = config_of(rank)
        comm = Communicator.connect(server.parallel, rank, store=store, timeout_s=30)
        sabotage(rank, Engine)
        try:
            Engine(server, comm)
        except PrepareFailed as error:
            return str(error)
        return "started"

    return run_ranks(2, tmp_path, run)


def small(seed=0, **document):
    flags = {"scenario": "metadata_rebuild", "num_ranks": 2, "seed": seed}
    defaults = {"model": SMALL, "engine": {"unfinished_interval": 4}}
    return RunSettings.from_document({**defaults, **document}, flags, "").server()


def test_ranks_configured_differently_all_stop_before_the_first_step_and_name_the_values(tmp_path):
    def config(rank):
        server = small(seed=rank)
        return dataclasses.replace(server, engine=dataclasses.replace(server.engine, num_pages=64 - rank))

    words = "engine.num_pages is 64 on rank 0 and 63 on rank 1; seed is 0 on rank 0 and 1 on rank 1"
    message = f"the ranks are configured differently: {words}: start every rank with the same configuration"
    assert start_and_catch(tmp_path, config) == [message] * 2


def test_ranks_may_keep_their_files_in_different_folders(tmp_path):
    def checkpoint(folder, last):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights" * 10_000 + last)
        return str(folder)

    def config(folder, cache_dir):
        server = dataclasses.replace(small(), checkpoint=folder)
        return dataclasses.replace(server, engine=dataclasses.replace(server.engine, cache_dir=cache_dir))

    one, other = (config(checkpoint(tmp_path / name, b"1"), f"/{name}") for name in ("one", "other"))
    assert one.shared() == other.shared()
    trained_on = config(checkpoint(tmp_path / "trained on", b"2"), "")
    (difference,) = configuration_differences([json.dumps(one.shared()), json.dumps(trained_on.shared())])
    assert difference.startswith('checkpoint is "'), difference


def test_ranks_with_other_kernels_all_stop_before_the_first_step_and_name_the_operation(tmp_path):
    """As on two hosts with the same settings, of which one lacks a GPU, a compiler or a package."""

    def sabotage(rank, engine_class):
        table = registry.table
        registry.table = lambda device, dtype: table(device, dtype) | {"norm.rms_norm": ("fla", "torch")[rank]}

    words = 'kernels.norm.rms_norm is "fla" on rank 0 and "torch" on rank 1'
    message = f"the ranks are configured differently: {words}: choose kernels that every host has (HMR_KERNELS)"
    assert start_and_catch(tmp_path, lambda rank: small(), sabotage) == [message] * 2


def test_a_communicator_is_reused_after_success_and_refused_after_a_stop(tmp_path):
    config = dataclasses.replace(small(), checks="agree")

    def run(rank, store):
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        Engine(config, comm).serve([])
        engine = Engine(config, comm)
        with pytest.raises((ConfigError, ScheduleMismatch)) as first:
            engine.serve([Request("a", (), 1)] if rank else [])
        with pytest.raises(ScheduleMismatch) as again:
            engine.serve([])
        with pytest.raises(RuntimeError) as reused:
            Engine(config, comm)
        return type(first.value), str(again.value), str(reused.value)

    message = "rank 1 failed: ConfigError: request a: prompt has 0 tokens, but needs at least 1"
    refusal = f"this communicator was stopped ({message}): connect a new one"
    assert run_ranks(2, tmp_path, run) == [(kind, message, refusal) for kind in (ScheduleMismatch, ConfigError)]


def test_each_of_two_engines_in_a_process_loads_modules_by_its_own_policies(tmp_path):
    class Noted(KernelBuilds):
        def __init__(self):
            self.uses = []

        def first_use(self, extension, place):
            self.uses.append(extension)

    def run(rank, store):
        comm = Communicator.connect(small().parallel, rank, store=store, timeout_s=30)
        builds = [Noted(), Noted()]
        engines = [Engine(small(), comm, Policies(builds=each)) for each in builds]
        engines[0].serve([])
        kernel_extension._first_use[0]("module")
        return [each.uses for each in builds]

    assert run_ranks(2, tmp_path, run) == [[["module"], []]] * 2


def test_an_engine_refuses_on_all_ranks_to_serve_with_kernels_that_one_rank_chose_since(tmp_path, monkeypatch):
    """The choice is one for a process: another engine of rank 1's makes it."""
    norms = types.SimpleNamespace(rms_norm=norm.rms_norm)
    monkeypatch.setitem(sys.modules, "hybrid_moe_kernels.norm.fla", norms)

    config = dataclasses.replace(small(), checks="agree")

    def run(rank, store):
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        engine = Engine(config, comm)
        registry.use("torch")  # another word for what "auto" runs on a CPU
        engine.serve([])
        if rank:
            registry.use("fla")
        with pytest.raises((ConfigError, ScheduleMismatch)) as refused:
            engine.serve([])
        return str(refused.value)

    message = (
        "kernels: this engine was started with kernels 'auto', but the process now uses kernels 'fla': "
        "call registry.use('auto') before serve, or start a new engine"
    )
    assert run_ranks(2, tmp_path, run) == [f"rank 1 failed: ConfigError: {message}", message]


@pytest.mark.parametrize("num_drafts", [0, 1])
def test_the_draft_layer_is_held_only_where_something_drafts(tmp_path, num_drafts):
    server = small(model={**SMALL, "num_mtp_layers": 1}, engine={"num_drafts": num_drafts})

    def run(rank, store):
        engine = Engine(server, Communicator.connect(server.parallel, rank, store=store, timeout_s=30))
        return len(engine.model.draft_blocks), any("mtp" in name for name, _ in engine.model.named_parameters())

    assert run_ranks(2, tmp_path, run) == [(num_drafts, bool(num_drafts))] * 2


def test_a_rank_that_cannot_prepare_stops_all_ranks_with_its_error(tmp_path):
    def sabotage(rank, engine_class):
        if rank == 1:
            from hybrid_moe_ref.engine.step.runner import ModelRunner

            def warm_up(self):
                raise OSError("no compiler found")

            ModelRunner.warm_up = warm_up

    messages = start_and_catch(tmp_path, lambda rank: small(), sabotage)
    assert messages == ["rank 1 could not prepare: OSError: no compiler found"] * 2


@pytest.mark.parametrize(
    "phase", ["profile", *(pytest.param(p, marks=pytest.mark.full) for p in ("load", "page_setup", *PHASES[4:7]))]
)
def test_a_rank_that_fails_in_any_phase_stops_all_ranks_with_its_error(tmp_path, phase):
    config = small()
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, mode="graphs"))

    def run(rank, store):
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        if rank == 1:

            def fail(self):
                raise MemoryError("no room")

            setattr(Engine, f"_{phase}", fail)
        with pytest.raises((MemoryError, ScheduleMismatch)) as caught:
            Engine(config, comm).serve([])
        return type(caught.value), str(caught.value)

    messages = run_ranks(2, tmp_path, run)
    assert messages == [(ScheduleMismatch, "rank 1 failed: MemoryError: no room"), (MemoryError, "no room")]


@pytest.mark.parametrize("odd", ["observe", pytest.param("strict", marks=pytest.mark.full)])
def test_ranks_with_different_checks_meet_in_the_vote_and_stop(tmp_path, odd):
    def checks(rank):
        return dataclasses.replace(small(), checks=odd if rank else "agree", allow_unsafe=True)

    messages = start_and_catch(tmp_path, checks)
    assert messages[0] == messages[1] and "configured differently" in messages[0]


def test_warming_up_uses_both_kernels_of_a_mixer_the_experts_and_the_drafter():
    settings = RunSettings.from_document(
        {"model": {"layer_pattern": "GM", "num_mtp_layers": 1}}, {"scenario": "any"}, ""
    )
    model, called = HybridMoE(settings.model).init_weights(0), []

    def noting(name, forward):
        def run(x_NH, *args):
            called.append((name, len(x_NH)))
            return forward(x_NH, *args)

        return run

    for name, module in model.named_modules():
        if isinstance(module, (Mixer, Experts)):
            module.forward = noting(name, module.forward)
    comm = Communicator(0, torch.device("cpu"), {})
    ModelRunner(model, ForwardContext(), comm, Policies(), settings.server()).warm_up()
    used = [
        "model.layers.0.linear_attn",
        "model.layers.1.mamba",
        "mtp.layers.0.self_attn",
        "model.layers.0.mlp.experts",
    ]
    assert sorted(called) == sorted((name, rows) for name in used for rows in (1, 2))


def test_the_digest_of_a_rank_changes_with_any_setting():
    def digest(settings):
        return Ballot().digest(json.dumps(settings.server().shared()))

    settings = RunSettings("metadata_rebuild")
    assert 0 <= digest(settings) < 1 << 31
    assert digest(settings) == digest(RunSettings("metadata_rebuild"))
    assert digest(settings) != digest(RunSettings("metadata_rebuild", seed=1))
