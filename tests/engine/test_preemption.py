"""More requests than the cache holds: all are served with the tokens of one process, in every layout."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cut_models import CONFIG, SEED
from diary import Diary
from ranks import run_ranks
from test_drafting import guess_well, wanted_tokens

from hybrid_moe_ref.config import ConfigError, EngineConfig, ParallelConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.server_config import ServerConfig
from hybrid_moe_ref.engine.serving.scheduler import Request, Scheduler
from hybrid_moe_ref.model import HybridMoE
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.halt import ScheduleMismatch

MODEL = dataclasses.replace(CONFIG, num_mtp_layers=1)
ENGINE = EngineConfig(
    max_num_seqs=4, max_num_batched_tokens=24, num_pages=7, unfinished_interval=8, dtype="float64"
)  # fmt: skip
DRAW = random.Random(SEED)
LENGTHS = {"a": (44, 8), "b": (45, 7), "c": (3, 5), "d": (50, 2)}  # prompt, new tokens; a page holds 48
REQUESTS = [Request(name, tuple(DRAW.choices(range(61), k=num)), new) for name, (num, new) in LENGTHS.items()]


def pages_for(length):
    """Of a model with two groups of recurrent layers, and pages of 4 tokens."""
    return 2 + -(-length // 4)


def run_to_the_end(scheduler, limit=2000):
    """What each step feeds, and the requests that were preempted, in order."""
    fed, preempted = [], []
    for step in range(limit):
        if not scheduler.unfinished:
            return fed, preempted
        preempted += [running.request.request_id for running in scheduler.make_room()]
        running = scheduler.schedule(step)
        assert scheduler.num_free_pages >= 0
        fed.append({r.request.request_id: r.num_fed for r in running})
        scheduler.pretend()
    raise AssertionError(f"still unfinished after {limit} steps")


def test_the_youngest_request_gives_way_and_is_fed_again_from_the_beginning():
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, num_pages=7)
    scheduler = Scheduler([Request("old", (1,) * 4, 4), Request("young", (2,) * 3, 6)], config, pages_for)
    fed, preempted = run_to_the_end(scheduler)
    # Each holds two states and a page of tokens. The old one needs a second page in step 1, the other one in step 2.
    assert fed[:4] == [{"old": 4, "young": 3}, {"old": 1, "young": 1}, {"old": 1}, {"old": 1}]
    assert preempted == ["young"] and fed[4] == {"young": 5}, "three of the prompt, and the two that it had made"
    assert {name: len(output) for name, output in scheduler.finished.items()} == {"old": 4, "young": 6}


def test_what_no_step_can_hold_is_fed_in_parts_beside_requests_that_decode():
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=8)
    scheduler = Scheduler([Request("short", (1,), 4), Request("long", (2,) * 20, 1)], config)
    fed, _ = run_to_the_end(scheduler)
    assert fed == [{"short": 1, "long": 7}, {"short": 1, "long": 7}, {"short": 1, "long": 6}, {"short": 1}]


@pytest.mark.parametrize("seed", range(100))
def test_whatever_the_cache_holds_all_drawn_requests_are_served(seed):
    draw = random.Random(seed)
    config = EngineConfig(
        max_num_seqs=draw.randint(1, 5), max_num_batched_tokens=draw.randint(5, 20), num_pages=draw.randint(8, 30)
    )
    requests = [
        Request(str(i), (1,) * draw.randint(1, 16), draw.randint(1, 8), draw.randint(0, 9))
        for i in range(draw.randint(1, 8))
    ]
    scheduler = Scheduler(requests, config, pages_for)
    fed, _ = run_to_the_end(scheduler)
    assert all(sum(step.values()) <= config.max_num_batched_tokens for step in fed), f"seed {seed}"
    assert {r.request_id: r.max_new_tokens for r in requests} == {
        name: len(output) for name, output in scheduler.finished.items()
    }, f"seed {seed}"


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", (1,) * 9, 24), "9 prompt tokens and 24 new ones take 10 pages, but engine.num_pages is 9"),
        (Request("a", (), 1), "request a: prompt has 0 tokens, but needs at least 1"),
        (Request("a", (1,), 0), "request a: max_new_tokens has 0 tokens, but needs at least 1"),
    ],
)  # fmt: skip
def test_a_request_that_can_never_be_served_is_refused_before_the_first_step(request_, words):
    with pytest.raises(ConfigError) as refused:
        Scheduler([request_], EngineConfig(num_pages=9), pages_for)
    assert str(refused.value).endswith(words)


@pytest.fixture(scope="module")
def wanted():
    model = HybridMoE(MODEL, device="meta", dtype=torch.float64).init_weights(SEED)
    return {r.request_id: model.generate(torch.tensor([r.prompt]), r.max_new_tokens)[0].tolist() for r in REQUESTS}


@pytest.mark.parametrize(
    ("dp_size", "tp_size", "change"),
    [
        (2, 1, {"num_drafts": 2}),
        (2, 2, {"mode": "graphs"}),
        pytest.param(2, 1, {}, marks=pytest.mark.full),
        pytest.param(1, 2, {"num_drafts": 1, "mode": "graphs"}, marks=pytest.mark.full),
        pytest.param(2, 1, {"mode": "graphs", "microbatch_tokens": 4, "num_drafts": 1}, marks=pytest.mark.full),
    ],
)
def test_ranks_whose_cache_holds_two_requests_serve_four(tmp_path, wanted, dp_size, tp_size, change):
    config = ServerConfig(MODEL, ParallelConfig(dp_size, tp_size), dataclasses.replace(ENGINE, **change), SEED)

    def run(rank, store):
        diary, preempted = Diary(), []
        comm = Communicator.connect(config.parallel, rank, store=store, observer=diary, timeout_s=30)
        engine = Engine(config, comm)
        make_room = Scheduler.make_room

        def noted(self):
            victims = make_room(self)
            preempted.extend(victim.request.request_id for victim in victims)
            return victims

        Scheduler.make_room = noted
        tokens = engine.serve(REQUESTS if rank < tp_size else REQUESTS[-1:])
        assert engine.cache.num_free_pages == engine.cache.num_pages
        return tokens, diary, preempted

    results = run_ranks(dp_size * tp_size, tmp_path, run)
    for rank, (tokens, diary, preempted) in enumerate(results):
        names = LENGTHS if rank < tp_size else ["d"]
        assert tokens == {name: wanted[name] for name in names}, f"rank {rank}, seed {SEED}"
        assert preempted if rank < tp_size else not preempted, f"rank {rank} preempted {preempted}"
        for (step, schedule, _), issued in zip(diary.steps, diary.issued, strict=True):
            assert [(e.group, e.op, e.layer) for e in schedule] == issued, f"rank {rank} step {step}"


@pytest.mark.full
@pytest.mark.parametrize("seed", range(6))
def test_drawn_requests_drafts_and_pages_give_the_tokens_of_one_process(tmp_path, seed):
    """With drafts of which some are right, so that steps are undone, cut and preempted in every order."""
    draw = random.Random(f"preemption {seed}")
    dp_size, tp_size = draw.choice([(2, 1), (1, 2), (2, 2)])
    requests = [
        [
            Request(f"{rank}-{i}", tuple(draw.choices(range(61), k=draw.randint(1, 60))), draw.randint(1, 12), i)
            for i in range(draw.randint(1, 5))
        ]
        for rank in range(dp_size)
    ]
    engine_config = dataclasses.replace(
        ENGINE,
        num_pages=draw.randint(4, 8),
        num_drafts=draw.randint(1, 3),
        mode=draw.choice(["eager", "graphs"]),
        microbatch_tokens=draw.choice([0, 4]),
    )
    config = ServerConfig(MODEL, ParallelConfig(dp_size, tp_size), engine_config, SEED)
    right = wanted_tokens([request for mine in requests for request in mine])

    def run(rank, store):
        engine = Engine(config, Communicator.connect(config.parallel, rank, store=store, timeout_s=30))
        guess_well(engine, right, 0.3)
        tokens = engine.serve(requests[rank // tp_size])
        assert engine.cache.num_free_pages == engine.cache.num_pages
        return tokens

    for rank, tokens in enumerate(run_ranks(dp_size * tp_size, tmp_path, run)):
        assert tokens == {r.request_id: right[r.request_id] for r in requests[rank // tp_size]}, f"seed {seed}"


def test_a_cache_too_small_for_any_request_is_refused_at_start_and_one_too_small_for_a_request_at_once(tmp_path):
    def run(rank, store):
        config = ServerConfig(CONFIG, ParallelConfig(2), dataclasses.replace(ENGINE, num_pages=2), SEED)
        comm = Communicator.connect(config.parallel, rank, store=store, timeout_s=30)
        with pytest.raises(ConfigError) as small:
            Engine(config, comm)
        return str(small.value)

    words = "engine.num_pages: 2 is less than the 3 pages of a sequence of one token"
    assert run_ranks(2, tmp_path, run) == [words] * 2

    def serve(rank, store):
        config = ServerConfig(CONFIG, ParallelConfig(2), dataclasses.replace(ENGINE, num_pages=3), SEED)
        engine = Engine(config, Communicator.connect(config.parallel, rank, store=store, timeout_s=30))
        with pytest.raises((ConfigError, ScheduleMismatch)) as large:
            engine.serve([Request("large", (1,) * 40, 10)] if rank else [])
        return str(large.value)

    words = "request large: 40 prompt tokens and 10 new ones take 4 pages, but engine.num_pages is 3"
    assert run_ranks(2, tmp_path, serve) == [f"rank 1 failed: ConfigError: {words}", words]
