"""The C++ kernels against the definitions in float64, for every instruction set that this processor has.

Lengths and sizes are drawn by hypothesis: few here, HMR_CASES of each op under `full`.
"""

import os
import threading
import time
from typing import Any

import kernel_cases as cases
import kernel_comparison as comparison
import pytest
import torch
from drawn_cases import any_sizes
from hybrid_moe_kernels import causal_conv, gated_delta_rule, moe, native, registry
from hybrid_moe_kernels.linear import native as linear_native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from kernel_comparison import module_of
from torch import Tensor

from hybrid_moe_ref import HybridMoE, preset
from hybrid_moe_ref.config import ModelConfig

FULL_CASES = int(os.environ.get("HMR_CASES", "500"))
LENGTHS = some.lists(some.sampled_from([0, 1, 1, 2, 3, 5, 17, 64, 65, 130]), max_size=4)
LENGTHS |= some.lists(some.integers(0, 3), min_size=5, max_size=12)
DRAWN = any_sizes(LENGTHS, rows=LENGTHS.map(sum), most=70)
del DRAWN["moe.route"]  # is torch's
OPS = pytest.mark.parametrize("op", DRAWN)

CASES = {case.op: case for case in cases.SMALL + cases.WITHOUT_TRITON if case.op in DRAWN}


@pytest.fixture(scope="module")
def library(native_library: Any) -> Any:
    best, num_threads = native_library.instruction_set(), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other are most of the time
    max_rows, linear_native.MAX_ROWS = linear_native.MAX_ROWS, dict.fromkeys(native.DTYPES, 1 << 62)
    yield native_library
    linear_native.MAX_ROWS = max_rows
    torch.set_num_threads(num_threads)
    native_library.use_instruction_set(best)


def check(case: comparison.Case, library: Any, gap: int) -> None:
    torch.set_num_threads(1 + case.seed % 2)
    for dtype in native.DTYPES:
        rounded = case.rounded(dtype)
        results = comparison.expected(rounded, dtype)
        for isa in library.instruction_sets():
            library.use_instruction_set(isa)
            try:
                comparison.check(rounded, module_of(case, "native"), dtype, gap=gap, results=results)
            except AssertionError as error:
                raise AssertionError(f"{isa}: {error}") from None


@OPS
@settings(max_examples=6, suppress_health_check=list(HealthCheck))
@given(data=some.data(), gap=some.sampled_from([0, 3]))
def test_op_is_its_definition(op: str, library: Any, data: some.DataObject, gap: int) -> None:
    check(data.draw(DRAWN[op]), library, gap)


@pytest.mark.full
@pytest.mark.timeout(1800)
@OPS
@settings(max_examples=FULL_CASES, derandomize=False, suppress_health_check=list(HealthCheck))
@given(data=some.data(), gap=some.sampled_from([0, 3, 16]))
def test_op_is_its_definition_many_cases(op: str, library: Any, data: some.DataObject, gap: int) -> None:
    check(data.draw(DRAWN[op]), library, gap)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(FULL_CASES // 5))
def test_lengths_up_to_two_thousand(seed: int, library: Any) -> None:
    lengths = torch.randint(1, 2001, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    heads, size = 1 + seed % 2, 16 + seed % 20
    for case in (
        cases.gdn_prefill(seed, lengths, heads, 2, size, 24),
        cases.ssd_prefill(seed, lengths, heads, 2, 24, size),
        cases.conv_prefill(seed, lengths, heads * 48, W=4, bias=False),
    ):
        for dtype in native.DTYPES:
            comparison.check(case.rounded(dtype), module_of(case, "native"), dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_nan_reaches_whatever_depends_on_it(case: comparison.Case, library: Any) -> None:
    """What depends on an element is what changes with it in float64."""

    def results(backend: str, dtype: torch.dtype, change: tuple[int, float] | None) -> list[Tensor]:
        args = case.inputs(dtype, "cpu", gap=0)
        if change is not None:
            x = args[change[0]][0] if isinstance(args[change[0]], list) else args[change[0]]
            x[tuple(size // 2 for size in x.shape)] += change[1]
        return comparison.results(case, module_of(case, backend), args)

    before = results("reference", torch.float64, None)
    for place, arg in enumerate(case.args):
        arg = arg[0] if isinstance(arg, list) else arg
        if not isinstance(arg, Tensor) or not arg.is_floating_point():
            continue
        after = results("reference", torch.float64, (place, 1.0))
        for isa in library.instruction_sets():
            library.use_instruction_set(isa)
            for dtype in native.DTYPES:
                got = results("native", dtype, (place, torch.nan))
                for number, (mine, a, b) in enumerate(zip(got, before, after, strict=True)):
                    lost = ~mine.isnan() & (a != b)
                    assert not lost.any(), f"{case}: argument {place}, result {number}, {isa} {dtype}: {lost.nonzero()}"


@pytest.mark.parametrize("case", [case for case in cases.EMPTY if case.op in DRAWN], ids=str)
def test_no_tokens_at_all(case: comparison.Case, library: Any) -> None:
    comparison.check(case, module_of(case, "native"), torch.float32)


def test_other_threads_run_during_a_native_call(library: Any) -> None:
    x, weight, span = torch.ones(256, 1024), torch.ones(2048, 1024), [0.0, 0.0]

    def call_it() -> None:
        span[0] = time.monotonic()
        library.project(x, [weight])
        span[1] = time.monotonic()

    until = time.monotonic() + 60
    while time.monotonic() < until:  # on a busy machine this thread may get no processor during many of the calls
        seen: list[float] = []
        worker = threading.Thread(target=call_it)
        worker.start()
        while worker.is_alive():
            seen.append(time.monotonic())
        quarter = (span[1] - span[0]) / 4
        if any(span[0] + quarter < at < span[1] - quarter for at in seen):
            return
    pytest.fail("no other thread ran in the middle of any call for 60 s")


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_bad_argument_is_named_with_both_values(backend: str, library: Any) -> None:
    good = cases.gdn_prefill(0, [2, 3], M=2, R=2, K=8, V=16).inputs(torch.float32, "cpu", gap=0)
    bad = {
        r"k_TMK: the shape is \[5, 2, 7\], but must be \[T = 5, M = 2, K = 8\]": (1, good[1][..., :7].clone()),
        r"v_THV: the dtype is float64, but must be float32": (2, good[2].double()),
        r"H: the size is 3, but must be a multiple of M = 2": (2, good[2][:, :3].clone()),
        r"state_JHKV: the dtype is bfloat16, but must be float32": (5, good[5].bfloat16()),
        r"state_JHKV: the strides are \[512, 128, 1, 8\], but the last 3 dimensions must be contiguous": (
            5,
            torch.zeros(4 * 512).as_strided((4, 4, 8, 16), (512, 128, 1, 8)),
        ),
        r"slots_B: the dtype is int32, but must be int64": (6, good[6].int()),
        r"slots_B: an index is 4, but must be from 0 to 3": (6, torch.tensor([0, 4])),
        r"slots_B: index 1 appears 2 times, but must appear once": (6, torch.tensor([1, 1])),
        r"cu_seqlens_X: the numbers go from 0 to 4, but must go from 0 to 5": (7, torch.tensor([0, 2, 4])),
        r"cu_seqlens_X: 5 comes after 7, but the numbers must not decrease": (7, torch.tensor([0, 7, 5])),
        r"cu_seqlens_X: the shape is \[2\], but must be \[X = 3\]": (7, torch.tensor([0, 5])),
    }
    with registry.using(backend):
        gated_delta_rule.prefill(*good)
        for text, (index, value) in bad.items():
            with pytest.raises(ValueError, match=text):
                gated_delta_rule.prefill(*good[:index], value, *good[index + 1 :])
        with pytest.raises(ValueError, match=r"g_TH: the device is meta, but must be cpu"):
            gated_delta_rule.prefill(*good[:3], good[3].to("meta"), *good[4:])
        with pytest.raises(ValueError, match=r"gate_up_EJH: J is 8, but must be 2 I = 10"):
            moe.experts(
                torch.ones(1, 3), torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(2, 8, 3), torch.ones(2, 3, 5)
            )


def test_a_filter_that_is_wider_than_the_kernels_arrays_is_refused(library: Any) -> None:
    args = cases.conv_update(0, 2, 8, 17, False).inputs(torch.float32, "cpu", gap=0)
    with registry.using("native"), pytest.raises(ValueError, match="weight_CW: W = 17, wanted 1 to 16"):
        causal_conv.update(*args)


def test_the_registry_says_what_runs_and_float64_is_torchs(library: Any) -> None:
    assert set(registry.table("cpu", torch.float32).values()) == {"torch"}
    with registry.using("native"):
        assert registry.table("cpu", torch.bfloat16)["gated_delta_rule.decode"] == "native"
        assert set(registry.table("cpu", torch.float64).values()) == {"torch"}
    assert registry.choice() == "auto"
    with pytest.raises(ValueError, match="'fast' is not one of auto, torch, native"):
        registry.use("fast")


SMALL = ModelConfig(
    layer_pattern="GAM",
    vocab_size=64,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    mamba_num_heads=4,
    mamba_head_dim=16,
    mamba_state_size=16,
    num_experts=24,
    num_experts_per_tok=5,
    moe_intermediate_size=20,
    shared_expert_intermediate_size=28,
)


@pytest.mark.parametrize("config", [SMALL, preset("tiny")], ids=["odd sizes", "tiny"])
def test_a_model_computes_the_same_through_native_kernels(config: ModelConfig, library: Any) -> None:
    model = HybridMoE(config).init_weights(3)
    r = torch.Generator().manual_seed(3)
    prompts = [torch.randint(config.vocab_size, (length,), generator=r) for length in (1, 9, 70)]
    want_BT = model.generate(prompts, 8)
    want_BTV = model(prompts[2][None])
    with registry.using("native"):
        assert torch.equal(model.generate(prompts, 8), want_BT)
        got_BTV = model(prompts[2][None])
    assert (got_BTV - want_BTV).norm() <= 2e-5 * want_BTV.norm()
