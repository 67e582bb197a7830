"""The server: agreements, continuous batching, idle ranks, and the tokens of the single process."""

from __future__ import annotations

import pytest
from diary import PHASES, Diary
from ranks import run_ranks

from hybrid_moe_ref.config import EngineConfig
from hybrid_moe_ref.engine.lifecycle import Engine
from hybrid_moe_ref.engine.policies import StepAgreement
from hybrid_moe_ref.engine.serving.scheduler import Request, Scheduler, live_ranks
from hybrid_moe_ref.engine.step.plan import AgreedStep, StepPlan, StepSchedules
from hybrid_moe_ref.engine.step.protocol import protocol_of
from hybrid_moe_ref.parallel.comm import Communicator
from hybrid_moe_ref.parallel.sharding.dispatch import AllGatherReduceScatter
from repro.lab.outcome import reference
from repro.lab.settings import RunSettings


def test_c1_takes_the_lowest_mode_and_pads_only_for_a_graph():
    rows, drafts = [[3, 1, 7], [4, 2, 8], [1, 1, 0], [2, 1, 2], [2, 1, 5]], ((3, 1, 7), (2, 1, 5))
    resolve = protocol_of(EngineConfig()).resolve
    assert resolve(rows) == AgreedStep((8, 8, 8), mode=1, microbatch=False, draft_sizes=drafts)
    eager = resolve([*rows[:2], [1, 1, 1], [2, 0, 2], rows[4]])
    assert eager == AgreedStep((3, 1, 7), mode=0, microbatch=True, draft_sizes=drafts)


def test_a_step_agrees_once_however_often_it_is_asked():
    exchanged, protocol = [], protocol_of(EngineConfig())

    def exchange(plan, layer):
        exchanged.append(layer)
        return protocol.resolve([[number] for number in protocol.column(plan)])

    agreement, plan = StepAgreement(), StepPlan(step=4, num_tokens=2, num_live=1)
    first = agreement.agree(plan, exchange, "step")
    assert agreement.agree(plan, exchange, "layers.0.gated_delta_net") is first
    agreement.agree(StepPlan(step=5, num_tokens=2, num_live=1), exchange, "step")
    assert exchanged == ["step", "step"]


def test_scheduler_decodes_first_and_admits_prompts_within_its_budgets():
    config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=8)
    requests = [Request("a", (1, 2, 3, 4, 5), 2), Request("b", (6, 7, 8, 9), 2), Request("c", (1,), 1, arrival_step=1)]
    scheduler = Scheduler(requests, config)
    fed = []
    for step in range(4):
        running = scheduler.schedule(step)
        fed.append([(r.request.request_id, len(r.next_tokens())) for r in running])
        scheduler.update([[40 + step]] * len(running))
    # b does not fit beside a's prompt; when it runs, a decodes and c has arrived.
    assert fed == [[("a", 5)], [("a", 1), ("b", 4), ("c", 1)], [("b", 1)], []]
    assert scheduler.finished == {"a": [40, 41], "b": [41, 42], "c": [41]}
    assert not scheduler.unfinished


def serve(settings, tmp_path, num_ranks):
    def run(rank, store):
        diary = Diary()
        server = settings.server()
        comm = Communicator.connect(server.parallel, rank, store=store, observer=diary, timeout_s=60)
        return Engine(server, comm).serve(settings.requests()[rank]), diary

    return run_ranks(num_ranks, tmp_path, run, deadline_s=100)


@pytest.mark.parametrize("num_ranks", [4, pytest.param(8, marks=pytest.mark.full)])
def test_ranks_serve_the_tokens_of_one_process_and_issue_what_they_planned(tmp_path, num_ranks):
    pattern = "GGGA MGGA" if num_ranks == 8 else "GMAG"
    flags = {"scenario": "metadata_rebuild", "variant": "control", "num_ranks": num_ranks, "seed": 11}
    settings = RunSettings.from_document({"model": {"layer_pattern": pattern}}, flags, "")
    results = serve(settings, tmp_path, num_ranks)
    tokens = {name: output for outputs, _ in results for name, output in outputs.items()}
    assert tokens == reference.compute(settings), f"seed {settings.seed}"

    live = live_ranks(settings.requests(), settings.engine)
    num_steps = {len(diary.steps) for _, diary in results}
    assert num_steps == {1 + -(-len(live) // 32) * 32}, "the profile step, then whole intervals of 32"
    for rank, (_, diary) in enumerate(results):
        assert diary.phases == PHASES
        assert [num_live > 0 for _, _, num_live in diary.steps[1 : 1 + len(live)]] == [rank in step for step in live]
        for (step, schedule, _), issued in zip(diary.steps, diary.issued, strict=True):
            assert [(e.group, e.op, e.layer) for e in schedule] == issued, f"rank {rank} step {step}"
    assert any(0 < len(step) < num_ranks for step in live), "some ranks must run dummy batches beside busy ones"


def test_schedule_of_a_step_is_one_agreement_two_collectives_a_layer_and_the_question():
    forward = [entry for layer in range(2) for entry in AllGatherReduceScatter.plan(f"layers.{layer}.moe")]
    schedule = StepSchedules("dp", tuple(forward)).whole(asks_unfinished=True)
    entries = [(e.group, e.op, e.layer) for e in schedule]
    assert entries == [
        ("dp", "all_reduce", "step"),
        ("ep", "all_gather_v", "layers.0.moe"), ("ep", "reduce_scatter_v", "layers.0.moe"),
        ("ep", "all_gather_v", "layers.1.moe"), ("ep", "reduce_scatter_v", "layers.1.moe"),
        ("dp", "all_reduce", "unfinished"),
    ]  # fmt: skip
