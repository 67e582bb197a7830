"""The Triton kernels compiled, on a CUDA device: numbers, graphs, memory. Skipped without one.

CUDA is used in this process, so these tests come after those of test_gpu.py, whose ranks are forked from it; the
alphabet sees to that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import kernel_cases as cases
import kernel_comparison as comparison
import pytest
import torch
from hybrid_moe_kernels import registry
from kernel_comparison import error, module_of, op_of, poisoned, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # the first launch of each size compiles
    pytest.mark.skipif(not list(Path("/dev").glob("nvidia[0-9]*")), reason="no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

FRESH = int(os.environ.get("HMR_SEED") or time.time_ns() % 10**6)
"""First seed of inputs that nobody has tried before; HMR_SEED repeats them."""

REAL = [
    partial(cases.gdn_prefill, 101, [1, 63, 64, 65, 0, 777], M=2, R=4, K=128, V=128),
    partial(cases.gdn_prefill, 102, [2000], M=1, R=3, K=64, V=64),
    partial(cases.gdn_prefill, 103, [200, 3], M=1, R=2, K=128, V=128, repeated=True),
    partial(cases.gdn_prefill, 14, [90], M=1, R=2, K=64, V=17, repeated=True),
    partial(cases.gdn_decode, 104, B=7, M=2, R=4, K=128, V=128, W=4),
    partial(cases.gdn_decode, 105, B=300, M=1, R=3, K=64, V=64, W=4),
    partial(cases.ssd_prefill, 106, [1, 63, 64, 65, 0, 777], G=2, R=3, P=64, N=128),
    partial(cases.ssd_prefill, 107, [2000], G=1, R=4, P=64, N=64),
    partial(cases.ssd_decode, 108, B=7, G=2, R=16, P=64, N=128, W=4, bias=True, norm=True),
    partial(cases.ssd_decode, 109, B=7, G=1, R=3, P=64, N=64, W=4, bias=False, norm=False),
    partial(cases.conv_prefill, 110, [1, 2, 0, 500, 2000], C=300, W=4, bias=True),
    partial(cases.conv_update, 111, B=130, C=1111, W=4, bias=True),
    partial(cases.route, 112, N=1000, E=512, K=10),
    partial(cases.experts, 113, N=1, E=64, K=8, H=256, I=128),
    partial(cases.experts, 114, N=70, E=16, K=4, H=200, I=136),
    partial(cases.experts, 115, N=1000, E=8, K=4, H=256, I=128),
    partial(cases.rms_norm, 116, N=3000, H=256),
    partial(cases.rms_norm, 117, N=70, H=4096),
    partial(cases.norm_then_gate, 118, N=3000, H=128),
    partial(cases.gate_then_norm, 119, N=70, G=8, H=1024),
    partial(cases.rotate, 120, T=300, H=32, D=256, R=32),
]
"""Cases of the sizes that models have, built where they run: their 230 MB would slow every fork of other tests."""


def check(case, dtype):
    if case.op == "moe.route" and dtype == torch.bfloat16:
        pytest.skip("equal logits, whose order is free")
    comparison.check(case, module_of(case, "triton"), dtype, "cuda")


def name_of(make):
    return f"{make.func.__name__} {make.args} {make.keywords}"


@DTYPES
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_a_kernel_computes_the_reference(case, dtype):
    check(case, dtype)


@DTYPES
@pytest.mark.parametrize("make", REAL, ids=name_of)
def test_a_kernel_computes_the_reference_at_the_sizes_of_models(make, dtype):
    check(make(), dtype)


@pytest.mark.parametrize("case", cases.EMPTY, ids=str)
def test_no_tokens_are_no_launch(case):
    check(case, torch.float32)


@DTYPES
@pytest.mark.parametrize("first_seed", [0, FRESH], ids=["fixed", "fresh"])
def test_any_lengths(dtype, first_seed):
    """Sizes stay, as each new one compiles; lengths, states, slots and numbers are new each time, and a failure names
    its seed."""
    random = torch.Generator().manual_seed(first_seed)
    for seed in range(first_seed, first_seed + 20):
        lengths = (2000 ** torch.rand(4, generator=random)).long().tolist()
        lengths[seed % 4] *= seed % 3
        check(cases.gdn_prefill(seed, lengths, M=1, R=3, K=64, V=32), dtype)
        check(cases.ssd_prefill(seed, lengths, G=1, R=3, P=32, N=64), dtype)
        check(cases.conv_prefill(seed, lengths, C=70, W=4, bias=True), dtype)


@pytest.mark.parametrize("kernel", ["gated_delta_rule.prefill", "gated_delta_rule.decode", "ssd.prefill", "ssd.decode"])
def test_every_launch_size_that_a_benchmark_compares_is_right(kernel):
    from hybrid_moe_kernels.tile import forcing

    for case in (make() for make in REAL):
        if case.op == kernel:
            for config in module_of(case, "triton").CONFIGS[kernel]:
                with forcing(kernel, config):
                    check(case, torch.bfloat16)


IN_A_STEP = (
    *(cases.gdn_decode, cases.ssd_decode, cases.conv_update),
    *(cases.experts, cases.route, cases.rms_norm, cases.rotate),
)


@DTYPES
@pytest.mark.parametrize("make", [make for make in REAL if make.func in IN_A_STEP], ids=name_of)
def test_a_captured_step_replays_for_new_inputs(make, dtype):
    """Three replays, each with other numbers and other slots, against the reference on the same states; what the graph
    allocates is NaN before each."""
    case = make()
    if case.op == "moe.route" and dtype == torch.bfloat16:
        pytest.skip("equal logits, whose order is free")
    op, reference = op_of(case), module_of(case, "reference")
    args = case.inputs(dtype, "cuda")
    assert op.pick("cuda", dtype).backend == "triton"
    kept = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        op(*args, **case.options)  # checks its arguments, and compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with poisoned(), torch.cuda.graph(graph), registry.unchecked():
        out = op(*args, **case.options)
    for x, old in zip(args, kept, strict=True):
        if isinstance(x, torch.Tensor):
            x.copy_(old)
    inputs = [n for n, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for seed in range(FRESH, FRESH + 3):
        random = torch.Generator().manual_seed(seed)
        for place in inputs:
            if place not in case.states:
                shuffled = torch.randperm(args[place].shape[0], generator=random).cuda()
                args[place].copy_(args[place][shuffled].clone())
        if case.states:
            slots = args[case.states[-1] + 1]
            num_slots = args[case.states[0]].shape[0]
            slots.copy_(torch.randperm(num_slots, generator=random)[: slots.shape[0]])
        here = [x.cpu().clone() if isinstance(x, torch.Tensor) else x for x in args]
        wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in here]
        want, theirs = results(case, reference, wide), results(case, reference, here)
        graph.replay()
        torch.cuda.synchronize()
        got = [*(out if isinstance(out, tuple) else (out,)), *(args[place] for place in case.states)]
        for mine, yours, right in zip(got, theirs, want, strict=True):
            if not right.is_floating_point():
                assert torch.equal(mine.cpu(), right), f"{case}, shuffled by seed {seed}"
                continue
            limit = 5e-6 if dtype == torch.float32 else 1.2 * error(yours, right) + 1e-5
            assert error(mine, right) <= limit, f"{case}, shuffled by seed {seed}"


@pytest.mark.parametrize("num_sequences", [1, 64, 500])
def test_heads_that_share_inputs_never_see_them_shifted(num_sequences):
    """100 steps in a row: were a program to shift a key head's inputs before its fellows have read them, or a counter
    to be left behind, the states would part from those of the reference."""
    case = cases.gdn_decode(1, num_sequences, M=2, R=4, K=32, V=32, W=4)
    module, reference = module_of(case, "triton"), module_of(case, "reference")
    args, wide = case.inputs(torch.float32, "cuda"), case.inputs(torch.float64, "cpu", gap=0)
    for step in range(100):
        x = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(step))
        args[0].copy_(x)
        wide[0].copy_(x)
        y = module.decode(*args, **case.options)
        want = reference.decode(*wide, **case.options)
        assert torch.equal(args[8].cpu(), wide[8].float()), f"step {step}: remembered inputs"
        assert error(y, want) < 2e-5, f"step {step}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_a_prefill_that_is_compiled_at_first_use_computes_the_reference(dtype, monkeypatch, tmp_path):
    from hybrid_moe_kernels.gated_delta_rule import reference
    from hybrid_moe_kernels.lab import gdn_prefill

    monkeypatch.setenv("HMR_KERNEL_CACHE", str(tmp_path))
    for case in (REAL[0], REAL[1]):
        args, wide = case.inputs(dtype, "cuda"), case.inputs(torch.float64, "cpu", gap=0)
        y, want = gdn_prefill.prefill(*args), reference.prefill(*wide)
        limit = 5e-6 if dtype == torch.float32 else 1e-12
        assert error(y, want) <= limit and error(args[5], wide[5]) <= limit, f"{case}"


@pytest.mark.parametrize("op", sorted({case.op for case in cases.SMALL}))
def test_no_access_out_of_bounds(op, tmp_path):
    """compute-sanitizer over the small cases of an op, each tensor an allocation of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = Path(__file__).resolve().parents[1] / "support" / "kernel_cases.py"
    command = [tool, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, program, op]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]


def test_what_is_allocated_starts_as_nan():
    with poisoned():
        assert torch.empty(3, device="cuda").isnan().all()
