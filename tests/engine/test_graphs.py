"""Graph modes, padding and micro-batches: agreed by all ranks, and without effect on the tokens that are served."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from ranks import run_ranks

from hybrid_moe_ref.batch import Batch
from hybrid_moe_ref.cache.hybrid_cache import HybridCache
from hybrid_moe_ref.config import ConfigError, EngineConfig, ParallelConfig, preset
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.serving.scheduler import step_rows
from hybrid_moe_ref.engine.step.graphs import Tape, pad
from hybrid_moe_ref.engine.step.microbatch import Half, halves, part_of
from hybrid_moe_ref.engine.step.plan import padded_size
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.checks.guard import ScheduleGuard, collective_words
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import Halt, ScheduleMismatch
from hybrid_moe_ref.parallel.observer import Collective, NullObserver
from repro.lab.outcome import reference
from repro.lab.settings import RunSettings


class Diary(NullObserver):
    """The collectives of each step, with their sizes, and what was declared for it."""

    def __init__(self):
        self.declared, self.issued = {}, {}
        self.step = -1

    def begin_step(self, step, schedule, num_live):
        self.step = step
        self.declared.setdefault(step, []).extend((e.group, e.op, e.layer) for e in schedule)
        self.issued.setdefault(step, [])

    def enter(self, collective):
        if self.step >= 0:
            self.issued[self.step].append(collective)


def settings_with(engine, seed=3, **more):
    document = {"num_ranks": 3, "model": {"layer_pattern": "GMA", "num_experts": 48}, "engine": engine, **more}
    return RunSettings.from_document(document, {"scenario": "any", "variant": "control", "seed": seed}, "")


def serve(settings, tmp_path, parallel=None):
    def run(rank, store):
        diary = Diary()
        server = settings.server()
        if parallel:
            server = dataclasses.replace(server, parallel=parallel)
        comm = Communicator.connect(server.parallel, rank, store=store, observer=diary, timeout_s=60)
        engine = Engine(server, comm)
        requests = settings.requests()[rank // server.parallel.tp_size]
        return engine.serve(requests), diary, engine.runner.graphs.captured

    num_ranks = parallel.world_size if parallel else settings.num_ranks
    return run_ranks(num_ranks, tmp_path, run, deadline_s=100)


def tokens_of(results):
    return {name: tokens for served, *_ in results for name, tokens in served.items()}


@pytest.mark.parametrize("sizes", [[2, 4], pytest.param([16], marks=pytest.mark.full)])
def test_steps_that_fit_a_graph_are_padded_alike_and_serve_the_tokens_of_one_process(tmp_path, sizes):
    settings = settings_with({"mode": "graphs", "capture_sizes": sizes, "unfinished_interval": 16})
    results = serve(settings, tmp_path)
    where = f"seed {settings.seed}"
    assert tokens_of(results) == reference.compute(settings), where
    first_serve_step = 1 + 2 * len(sizes)  # after the profile step, and two for each size
    seen = set()
    for step, rows in enumerate(step_rows(settings.requests(), settings.engine), start=first_serve_step):
        agreed = padded_size(max(max(1, r) for r in rows), sizes)
        for _, diary, captured in results:
            assert set(captured) == {(1, size) for size in sizes}
            issued = [c for c in diary.issued[step] if c.group == "ep"]
            if agreed is None:  # one rank has too many rows for any graph: all run eagerly, with what they have
                assert {c.sizes for c in issued} == {tuple(max(1, r) for r in rows)}, f"{where} step {step}"
            else:
                assert {c.sizes for c in issued} == {(agreed,) * 3}, f"{where} step {step}"
                assert tuple(issued) == captured[1, agreed], f"{where} step {step}: the replay issued other collectives"
        seen.add(agreed)
    assert len(seen) > 1 or sizes == [16], f"{where}: eager steps and graphs were to be seen, not {seen}"


@pytest.mark.full
def test_tensor_parallel_ranks_replay_graphs_too(tmp_path):
    settings = settings_with({"mode": "graphs", "unfinished_interval": 16}, num_ranks=2)
    results = serve(settings, tmp_path, ParallelConfig(dp_size=2, tp_size=2))
    assert tokens_of(results) == reference.compute(settings), f"seed {settings.seed}"


def test_a_step_that_all_want_to_split_dispatches_twice_in_each_layer(tmp_path):
    settings = settings_with(
        {"microbatch_tokens": 2, "unfinished_interval": 16},
        workload={"max_prompt_tokens": 12, "max_new_tokens": 7, "max_idle_ranks": 1},
        seed=0,
    )
    results = serve(settings, tmp_path)
    where = f"seed {settings.seed}"
    assert tokens_of(results) == reference.compute(settings), where
    split_steps = 0
    for step, rows in enumerate(step_rows(settings.requests(), settings.engine), start=1):
        splits = all(max(1, r) >= 2 for r in rows)
        split_steps += splits
        for _, diary, _ in results:
            issued = diary.issued[step]
            dispatches = [c for c in issued if c.op == "all_gather_v"]
            assert len(dispatches) == (6 if splits else 3), f"{where} step {step} {rows}"
            assert [(c.group, c.op, c.layer) for c in issued] == diary.declared[step], f"{where} step {step}"
            if splits:
                assert dispatches[0].sizes == tuple((r + 1) // 2 for r in rows)
                assert dispatches[3].sizes == tuple(r // 2 for r in rows)
    assert split_steps, f"{where}: no step was split"


@functools.cache
def tiny() -> HybridMoE:
    return HybridMoE(preset("tiny"), device="meta", dtype=torch.float64).init_weights(0)


def test_padding_adds_rows_that_no_other_row_sees():
    model = tiny()
    hidden = []
    for size in (5, 5 + 6):
        cache = HybridCache(model.config, 16, dtype=torch.float64)
        sequences = [cache.allocate(), cache.allocate()]
        tokens, batch = pad(torch.arange(5), Batch.of([(sequences[0], 4), (sequences[1], 1)]), size)
        hidden.append(model.step(tokens, batch, cache)[:5])
        tokens, batch = pad(torch.arange(2), Batch.of([(s, 1) for s in sequences]), size - 3)
        hidden.append(model.step(tokens, batch, cache)[:2])
    torch.testing.assert_close(hidden[2], hidden[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(hidden[3], hidden[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [(6,), (1, 1, 1), (5, 1, 2), (1, 7), (3, 3), (1,)])
def test_two_halves_of_a_step_leave_the_hidden_states_and_the_cache_as_one_step_does(counts):
    model = tiny()
    tokens = torch.arange(sum(counts))
    whole, split = [], []
    for out in (whole, split):
        cache = HybridCache(model.config, 40, dtype=torch.float64)
        sequences = [cache.allocate() for _ in counts]
        for _ in range(2):  # the second time from where the first left the cache
            batch = Batch.of(list(zip(sequences, counts, strict=True)))
            parts = halves(len(tokens)) if out is split else (Half(0, len(tokens)),)
            for half in parts:
                if half.start < half.stop:
                    out.append(model.step(tokens[half.start : half.stop], part_of(batch, half), cache))
    torch.testing.assert_close(torch.cat(split), torch.cat(whole), rtol=0, atol=1e-12)


def test_a_replay_that_would_issue_another_collective_is_refused_before_it_does():
    recorded = [Collective("ep", "all_gather_v", "layers.0.moe", (2, 2)), Collective("ep", "reduce_scatter_v", "x")]
    tape = Tape(recorded, ScheduleGuard(2, Halt(None)))
    tape.on_collective(recorded[0])
    with pytest.raises(
        ScheduleMismatch, match=r"^rank 2 would issue dp all_reduce of step.*captured step issued ep reduce_scatter_v"
    ):
        tape.on_collective(Collective("dp", "all_reduce", "step", (4,)))
    with pytest.raises(ScheduleMismatch, match=r"^rank 2 ended a replay, but the captured step also issued ep reduce"):
        tape.end()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda issued: (*issued[:-1], issued[-1]._replace(reduce_op="max")),
            "rank 1 would issue {} in a replay, but the captured step issued {}",
        ),
        (lambda issued: (*issued, issued[-1]), "rank 1 ended a replay, but the captured step also issued {}"),
    ],
    ids=["another collective", "one fewer"],
)
def test_a_replay_that_departs_from_its_capture_stops_every_rank_with_the_same_message(tmp_path, change, words):
    settings = settings_with({"mode": "graphs", "capture_sizes": [16], "unfinished_interval": 16})

    def run(rank, store):
        comm = Communicator.connect(settings.server().parallel, rank, store=store, timeout_s=30)
        engine = Engine(settings.server(), comm)
        issued = engine.runner.graphs.captured[1, 16]
        if rank == 1:
            engine.runner.graphs._captured[1, 16] = change(issued)
        with pytest.raises(ScheduleMismatch) as caught:
            engine.serve(settings.requests()[rank])
        return str(caught.value), collective_words(issued[-1])

    messages = run_ranks(3, tmp_path, run)
    last = messages[1][1]
    assert {message for message, _ in messages} == {words.format(last, last)}, messages


def test_the_sizes_of_graphs_are_checked_and_cover_every_decode_step():
    assert EngineConfig().graph_sizes == ()
    assert EngineConfig(mode="graphs", max_num_seqs=6).graph_sizes == (1, 2, 4, 6)
    assert EngineConfig(mode="graphs", capture_sizes=(8, 3, 8)).graph_sizes == (3, 8)
    assert [padded_size(n, (3, 8)) for n in (0, 3, 4, 9)] == [3, 3, 8, None]
    with pytest.raises(ConfigError, match=r"capture_sizes\[1\]: 300 is not between 1 and max_num_batched_tokens 256"):
        EngineConfig(capture_sizes=(4, 300))
    with pytest.raises(ConfigError, match=r"mode: unknown mode 'graph'.*did you mean 'graphs'"):
        EngineConfig(mode="graph")
