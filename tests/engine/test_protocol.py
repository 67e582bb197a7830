"""The step agreement and the question "is anyone unfinished?" have the rows and the steps of a version of vLLM."""

from __future__ import annotations

import itertools

import pytest
from diary import SMALL
from ranks import run_ranks

from hybrid_moe_ref.config import ConfigError, EngineConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.serving.scheduler import Request
from hybrid_moe_ref.engine.step.plan import ANYONE_UNFINISHED, EAGER, GRAPH, STEP_AGREEMENT, StepPlan
from hybrid_moe_ref.engine.step.protocol import protocol_of
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.observer import NullObserver
from repro.lab.settings import RunSettings

OWN_ROWS = 9
"""The rows of this engine after those of the version: rows of the drafter, and two hashes of four."""


@pytest.mark.parametrize(
    ("version", "interval", "steps"),
    [("0.20", 0, [32, 64, 96]), ("0.33", 0, [1, 16, 32]), ("0.20", 4, [4, 8, 12]), ("0.33", 4, [1, 4, 8])],
)
def test_the_ranks_ask_after_the_steps_of_the_version(version, interval, steps):
    protocol = protocol_of(EngineConfig(protocol=version, unfinished_interval=interval))
    assert list(itertools.islice(filter(protocol.asks, itertools.count(1)), 3)) == steps
    ends = [protocol.last_step(num_steps) for num_steps in (0, 1, steps[1], steps[1] + 1)]
    assert ends == [steps[0], steps[0], steps[1], steps[2]]


@pytest.mark.parametrize(
    ("plan", "column"),
    [
        (StepPlan(0, 12, 2, query_lengths=(5, 7)), [12, EAGER, 0, 7, 1, 2, 0]),
        (StepPlan(0, 3, 3, padded_tokens=4, mode=GRAPH, query_lengths=(1, 1, 1)), [3, GRAPH, 1, 1, 1, 3, 0]),
        (StepPlan(0, 6, 2, query_lengths=(3, 3)), [6, EAGER, 3, 3, 1, 2, 0]),  # one token and two drafts each
        (StepPlan(0, 8, 2, query_lengths=(4, 4)), [8, EAGER, 0, 4, 1, 2, 0]),  # prompts of one length
        (StepPlan(0, 1, 0, query_lengths=(1,)), [1, EAGER, 1, 1, 1, 1, 0]),  # a dummy batch
    ],
)
def test_the_rows_of_0_33_are_tokens_mode_uniform_tokens_longest_query_microbatch_requests_and_skips(plan, column):
    protocol = protocol_of(EngineConfig(protocol="0.33", num_drafts=2, microbatch_tokens=8))
    assert len(protocol.rows) == 7
    assert protocol.column(plan) == [*column, *[0] * OWN_ROWS]


def test_the_rows_of_0_20_are_tokens_padded_tokens_microbatch_and_mode():
    protocol = protocol_of(EngineConfig(protocol="0.20"))
    plan = StepPlan(
        0, 3, 3, padded_tokens=4, mode=GRAPH, wants_microbatch=True, draft_rows=2, schedule_hash=1 << 48 | 7
    )
    assert len(protocol.rows) == 4
    assert protocol.column(plan) == [3, 4, 1, GRAPH, 2, 1, 0, 0, 7, 0, 0, 0, 0]


def agreed(version, plans, **engine):
    protocol = protocol_of(EngineConfig(protocol=version, **engine))
    return protocol.resolve(list(zip(*map(protocol.column, plans), strict=True)))


@pytest.mark.parametrize("version", ["0.20", "0.33"])
def test_both_versions_come_to_the_same_decision(version):
    graphs = {"mode": "graphs", "capture_sizes": (2, 4, 8)}
    small, large = (StepPlan(0, n, n, padded, GRAPH, query_lengths=(1,) * n) for n, padded in ((2, 2), (3, 4)))
    prompt = StepPlan(0, 40, 1, query_lengths=(40,))
    assert agreed(version, [small, large, small], **graphs).sizes == (4, 4, 4)
    assert agreed(version, [small, prompt], **graphs).sizes == (2, 40)
    split = [StepPlan(0, n, 1, wants_microbatch=n >= 4, query_lengths=(n,)) for n in (4, 9, 3)]
    assert agreed(version, split[:2], microbatch_tokens=4).microbatch
    assert not agreed(version, split, microbatch_tokens=4).microbatch


def test_an_unknown_version_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"protocol: unknown protocol '0\.99'; known: 0\.20, 0\.33"):
        EngineConfig(protocol="0.99")


class Exchanges(NullObserver):
    """Notes the sizes of C1, and the payload and reduce op of the question with its step in the wave."""

    def __init__(self):
        self.agreements, self.questions, self.steps = set(), [], 0

    def phase(self, name):
        if name == "serve":
            self.steps = 0

    def enter(self, collective):
        if collective.layer == STEP_AGREEMENT:
            self.steps += 1
            self.agreements.add(collective.sizes)
        elif collective.layer == ANYONE_UNFINISHED:
            self.questions.append((self.steps, collective.reduce_op, *collective.sizes))


@pytest.mark.parametrize(
    ("version", "num_rows", "asked"),
    [
        ("0.20", 4, [(32, "max", 1)] * 2),
        ("0.33", 7, [(1, "sum", 2), (16, "sum", 2), (32, "sum", 2), (1, "sum", 2), (16, "sum", 2)]),
    ],
)
def test_a_server_exchanges_what_the_version_does_and_each_wave_counts_its_steps_anew(
    tmp_path, version, num_rows, asked
):
    document = {"model": SMALL, "engine": {"protocol": version}}
    flags = {"scenario": "metadata_rebuild", "num_ranks": 2, "seed": 3}
    server = RunSettings.from_document(document, flags, "").server()
    waves = [Request("a", (5, 6, 7), 20)], [Request("b", (5, 6, 7), 3)]

    def run(rank, store):
        seen = Exchanges()
        comm = Communicator.connect(server.parallel, rank, store=store, observer=seen, timeout_s=60)
        engine = Engine(server, comm)
        for requests in waves:
            engine.serve(requests if rank else [])
        return seen.agreements, seen.questions

    assert run_ranks(2, tmp_path, run) == [({((num_rows + OWN_ROWS) * 2,)}, asked)] * 2
