"""The start vote and the preparation: all ranks go on, or all stop with the same sentence, and nobody hangs."""

from __future__ import annotations

import os
import threading
import time
import types

import pytest
import torch.distributed as dist

from repro.attach.vllm.guard.ending.stop import Refused, Stop
from repro.attach.vllm.guard.meeting import settings
from repro.attach.vllm.guard.meeting.meeting import Meeting
from repro.attach.vllm.guard.meeting.vote import decide, differences
from repro.attach.vllm.guard.preparation import builders, prepare
from repro.attach.vllm.guard.preparation.builders import Builder, BuilderError


class Clock:
    """Time that passes only where a rank waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.5
        return self.now_s


def vote(ballots, present=None, deadline_s=60.0, clock=None, judge=settings.judge):
    """Each present rank votes in a thread; returns what each got."""
    store = dist.HashStore()
    outcomes = {}

    def cast(rank):
        meeting = Meeting(dist.PrefixStore("x", store))
        outcomes[rank] = decide(
            meeting, "start", ballots[rank], rank, len(ballots), deadline_s, judge, clock=clock or time.monotonic
        )

    threads = [
        threading.Thread(target=cast, args=(rank,)) for rank in (range(len(ballots)) if present is None else present)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def config(**changes):
    """What a rank reads of vLLM's configuration."""
    parallel = types.SimpleNamespace(
        data_parallel_size=2, enable_expert_parallel=True, all2all_backend="allgather_reducescatter",
        dp_sync_interval=16, world_size_across_dp=8,
    )  # fmt: skip
    made = types.SimpleNamespace(
        parallel_config=parallel,
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=512),
        model_config=types.SimpleNamespace(is_hybrid=True),
    )
    for path, value in changes.items():
        part, _, name = path.partition("__")
        setattr(getattr(made, part), name, value)
    return made


def ballot(mode="agree", missing=(), **changes):
    return settings.ballot(config(**changes), mode, list(missing), True)


def test_ranks_that_are_alike_may_start():
    assert vote([ballot(), ballot(), ballot()]) == {0: "", 1: "", 2: ""}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            ballot(parallel_config__dp_sync_interval=32),
            "parallel_config.dp_sync_interval is 16 on rank 0, 32 on rank 1",
        ),
        (
            ballot(scheduler_config__max_num_batched_tokens=8),
            "scheduler_config.max_num_batched_tokens is 512 on rank 0",
        ),
        (ballot("observe"), "HMR_GUARD is agree on rank 0, observe on rank 1"),
        (
            ballot(missing=["vllm.v1.worker.dp_utils.dist"]),
            "rank 1: this vLLM (unknown) lacks vllm.v1.worker.dp_utils.dist",
        ),
    ],
)
def test_a_rank_that_differs_is_named_with_the_setting_on_all_ranks(other, words):
    outcomes = vote([ballot(), other])
    assert outcomes[0] == outcomes[1] and words in outcomes[0], outcomes


def test_another_version_of_the_plug_in_is_named(monkeypatch):
    old = ballot()
    old["same"] = old["same"] | {"the plug-in's protocol": 0}
    outcomes = vote([ballot(), ballot(), old])
    assert len(set(outcomes.values())) == 1
    assert "the plug-in's protocol is 1 on ranks 0,1, 0 on rank 2" in outcomes[0]


@pytest.mark.parametrize("present", [[0, 2], [1, 2], [2]])
def test_a_rank_without_the_plug_in_ends_the_vote_at_the_deadline(present):
    outcomes = vote([ballot()] * 3, present, deadline_s=20, clock=Clock())
    assert len(set(outcomes.values())) == 1
    absent = [rank for rank in range(3) if rank not in present]
    assert all(str(rank) in outcomes[2] for rank in absent) and "did not answer within 20 s" in outcomes[2], outcomes


def test_a_rank_that_comes_too_late_gets_the_decision_of_the_others():
    store = dist.HashStore()

    def cast(rank, deadline_s):
        meeting = Meeting(dist.PrefixStore("x", store))
        return decide(meeting, "start", ballot(), rank, 2, deadline_s, settings.judge, clock=Clock())

    first = cast(1, 5)
    assert "did not answer" in first
    assert cast(0, 5) == first


def test_a_ballot_that_only_lacks_an_entry_differs():
    assert differences({0: {"a": 1}, 1: {}}) == ["a is 1 on rank 0, not set on rank 1"]


def test_a_backend_without_hooks_is_refused_in_the_words_of_the_report():
    sentence = settings.judge({0: ballot(), 1: ballot(parallel_config__all2all_backend="deepep_low_latency")})
    assert sentence.lower().startswith("expert parallelism is not supported for models with gdn/mamba hybrid layers")
    assert "--all2all-backend allgather_reducescatter" in sentence and "--tensor-parallel-size 8 instead" in sentence
    dense = config(parallel_config__all2all_backend="deepep_low_latency", model_config__is_hybrid=False)
    assert "use --all2all-backend allgather_reducescatter" in settings.unsupported(dense)
    assert not settings.unsupported(
        config(parallel_config__all2all_backend="x", parallel_config__enable_expert_parallel=False)
    )


def test_fault_tolerance_and_the_guard_exclude_each_other():
    assert "unset one of the two" in settings.unsupported(config(parallel_config__enable_fault_tolerance=True))


# -- prepare ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(ranks, tmp_path, monkeypatch):
    """A function that prepares all ranks with these builders; returns the ranks and what each raised."""
    monkeypatch.setattr(prepare.tempfile, "gettempdir", lambda: str(tmp_path))

    def run(num_ranks, *made, mode="agree"):
        monkeypatch.setattr(prepare, "chosen", lambda model: iter(made))
        all_ranks = ranks(num_ranks, mode)
        return all_ranks, all_ranks.run(lambda rank, guard: prepare.prepare(guard, None))

    return run


def test_one_rank_builds_while_the_others_wait_for_its_lock_and_say_so(prepared, monkeypatch, capfd):
    building, most, calls, waits = [], [], [], []
    all_wait = threading.Event()
    say = Stop.say

    def noted(stop, text):
        say(stop, text)
        if "this rank waits for the build lock of gdn, held by rank" in text:
            waits.append(stop.who)
            if len(set(waits)) == 2:
                all_wait.set()

    def build():
        calls.append(threading.get_ident())
        building.append(1)
        most.append(len(building))
        assert all_wait.wait(60)
        building.pop()

    monkeypatch.setattr(Stop, "say", noted)
    _, raised = prepared(3, Builder("gdn", lambda model: True, build))
    assert raised == [None] * 3 and max(most) == 1 and len(calls) == 3
    lines = capfd.readouterr().err.splitlines()
    assert len(set(waits)) == 2 and sum("all ranks are ready" in line for line in lines) == 3, lines
    assert sum("this rank waits for the build lock of gdn" in line for line in lines) >= 2, lines


def test_a_builder_that_fails_on_one_rank_stops_all_of_them_with_its_words(prepared):
    def build():
        if threading.current_thread() is failing[0]:
            raise RuntimeError("nvcc fatal: Unsupported gpu architecture")

    failing = []

    def first():
        failing[:] = failing or [threading.current_thread()]
        build()

    all_ranks, raised = prepared(3, Builder("gdn", lambda model: True, first))
    sentences = {stop.sentence for stop in all_ranks.stops}
    assert len(sentences) == 1 and all(isinstance(error, Refused) for error in raised), raised
    assert "could not prepare: RuntimeError: nvcc fatal: Unsupported gpu architecture" in sentences.pop()


def test_a_cache_that_cannot_be_written_says_which_setting_to_change(prepared):
    def build():
        raise OSError(30, "Read-only file system", "/cache")

    _, raised = prepared(2, Builder("gdn", lambda model: True, build))
    assert all("Read-only file system" in str(error) and "TORCH_EXTENSIONS_DIR" in str(error) for error in raised), (
        raised
    )


def test_a_builder_that_this_version_of_flashinfer_lacks_is_left_out(prepared, capfd):
    def build():
        raise ImportError("No module named 'flashinfer'")

    assert prepared(2, Builder("gdn", lambda model: True, build))[1] == [None, None]
    assert "gdn is not prepared: ImportError" in capfd.readouterr().err


def test_observe_builds_nothing(prepared, capfd):
    calls = []
    assert prepared(2, Builder("gdn", lambda model: True, lambda: calls.append(1)), mode="observe")[1] == [None, None]
    assert not calls and "would build gdn" in capfd.readouterr().err


def test_builders_are_those_of_the_model_and_of_the_variable(monkeypatch):
    layer = types.SimpleNamespace(gdn_prefill_backend="flashinfer")
    experts = type("FlashInferExperts", (), {})()
    moe = types.SimpleNamespace(
        quant_method=types.SimpleNamespace(moe_kernel=types.SimpleNamespace(fused_experts=experts))
    )
    model = types.SimpleNamespace(modules=lambda: [layer, moe])
    monkeypatch.setenv(builders.VARIABLE, "os:getpid")
    names = [builder.name for builder in builders.chosen(model)]
    assert names == ["FlashInfer's GDN prefill", "FlashInfer's CUTLASS fused MoE", "os:getpid"]
    plain = types.SimpleNamespace(modules=lambda: [types.SimpleNamespace(gdn_prefill_backend="triton")])
    (mine,) = builders.chosen(plain)
    assert mine.build() == os.getpid()
    monkeypatch.setenv(builders.VARIABLE, "os:nothing")
    with pytest.raises(BuilderError, match="HMR_GUARD_BUILDERS names os:nothing"):
        list(builders.chosen(plain))
