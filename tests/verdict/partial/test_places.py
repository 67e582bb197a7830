"""A collective in a place where its program never issues it names the rank that is in it, and nothing else does."""

from __future__ import annotations

import pytest

from repro.trace.foreign.records import Note, Process, Source, Stack
from repro.verdict.partial import diagnose

WRAPPER = "wrapper (torch/distributed/c10d_logger.py:83)"
LAYER = "forward (vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py:930)"
MODEL = "forward (vllm/model_executor/models/qwen3_next.py:726)"
RUNNER = "execute_model (vllm/v1/worker/gpu_model_runner.py:4031)"
AGREEMENT = (
    "all_reduce (torch/distributed/distributed_c10d.py:3252)",
    WRAPPER,
    "_run_ar (vllm/v1/worker/dp_utils.py:75)",
)
DISPATCH = (
    "all_gather (torch/distributed/distributed_c10d.py:4287)", WRAPPER,
    "dispatch (vllm/distributed/device_communicators/all2all.py:148)",
    "forward (vllm/model_executor/layers/fused_moe/runner/moe_runner.py:737)",
)  # fmt: skip
DRAFT = ("set_forward_context (vllm/forward_context.py:317)", "propose (vllm/v1/spec_decode/llm_base_proposer.py:1788)")
SGLANG = (
    "all_gather_into_tensor (torch/distributed/distributed_c10d.py:1)", WRAPPER,
    "prepare_mlp_sync_batch_raw (sglang/srt/managers/scheduler_dp_attn_mixin.py:90)",
)  # fmt: skip
IN_LAYER = (*AGREEMENT, LAYER, MODEL, RUNNER)
IN_PLACE = (*AGREEMENT, RUNNER)
IN_DISPATCH = (*DISPATCH, MODEL, RUNNER)


def records(*ranks, looks=2, activity="collective"):
    rows = [Note("world", "", Process(), str(len(ranks)))]
    for rank, frames in enumerate(ranks):
        for look in range(looks):
            process = Process(100 + rank, f"VLLM::Worker_DP{rank}_EP{rank}", rank, "worker")
            detail = frames[0].split()[0]
            source = Source(f"rank_{rank}.look{look}.json")
            rows.append(Stack(process, frames, activity, detail, "MainThread", 0, source))
    return rows


def verdict(rows):
    diagnosis = diagnose(rows)
    return diagnosis.verdict, diagnosis.cause, diagnosis.culprits, diagnosis.suspects


@pytest.mark.parametrize(
    "ranks",
    [
        (IN_DISPATCH, IN_LAYER),
        (IN_DISPATCH, IN_LAYER, IN_DISPATCH, IN_DISPATCH),
        (IN_PLACE, IN_LAYER),
        (IN_DISPATCH, (*SGLANG, "forward (sglang/srt/models/qwen3_next.py:30)")),
        (IN_DISPATCH, (*IN_LAYER[:2], "_run_ar (vllm/v1/worker/gpu/dp_utils.py:77)", LAYER, RUNNER)),
    ],
)
def test_a_step_agreement_in_a_layer_names_its_rank(ranks):
    diagnosis = diagnose(records(*ranks))
    assert (diagnosis.verdict, diagnosis.cause, diagnosis.culprits, diagnosis.confidence) == (
        "deadlock", "extra", (1,), "likely",
    ), diagnosis  # fmt: skip
    assert "below a layer of the model" in diagnosis.summary[0]


@pytest.mark.parametrize(
    ("why", "ranks", "suspects"),
    [
        ("the agreement before the forward pass is in its place", (IN_DISPATCH, IN_PLACE), ()),
        ("so is that of a drafter", (IN_DISPATCH, (*AGREEMENT, *DRAFT, RUNNER)), ()),
        (
            "and that of an encoder, which a model runs with a context of its own",
            (
                IN_DISPATCH,
                (*AGREEMENT, DRAFT[0], "_process_image_input (vllm/model_executor/models/lfm2_vl.py:794)", RUNNER),
            ),
            (),
        ),
        ("all ranks are there: their program issues it there", (IN_LAYER, IN_LAYER), ()),
        ("several ranks are there", (IN_LAYER, IN_DISPATCH, IN_LAYER), (0, 2)),
    ],
)
def test_nobody_is_named_where(why, ranks, suspects):
    diagnosis = diagnose(records(*ranks))
    assert not diagnosis.culprits and diagnosis.cause != "extra", (why, diagnosis)
    assert diagnosis.suspects == suspects or not suspects, (why, diagnosis)


def test_one_look_makes_a_suspect_only():
    assert verdict(records(IN_DISPATCH, IN_LAYER, looks=1)) == ("inconclusive", "", (), (1,))


def test_while_another_rank_builds_nobody_has_left_the_order():
    rows = records(IN_DISPATCH, IN_LAYER)
    build = records(("run_ninja (flashinfer/jit/cpp_ext.py:1)",) * 1, activity="building")[1:]
    third = [Stack(Process(102, "", 2, "worker"), row.frames, "building", "ninja", "MainThread", 0, row.source)
             for row in build]  # fmt: skip
    diagnosis = diagnose([*rows, *third])
    assert (diagnosis.verdict, diagnosis.culprits) == ("slow", (2,)), diagnosis
