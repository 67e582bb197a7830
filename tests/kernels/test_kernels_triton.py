"""The Triton kernels on a CPU, through Triton's interpreter, against the reference in float64.

What the interpreter cannot show - layouts, memory order, speed - is for test_kernels_gpu.py; that the kernels compile
for an H200 needs no GPU and stands at the end. With a GPU in the machine this file stands aside, as a process runs
kernels either compiled or interpreted.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if list(Path("/dev").glob("nvidia[0-9]*")):
    pytest.skip("a GPU is here: test_kernels_gpu.py runs the kernels compiled", allow_module_level=True)

OPS = ["causal_conv", "gated_delta_rule", "moe", "norm", "rope", "ssd"]
_set_outside = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"  # kernels look at it when they are made
import triton.experimental.gluon  # noqa: E402  # imported late, and it too looks then

KERNELS = {name: importlib.import_module(f"hybrid_moe_kernels.{name}.triton") for name in OPS}
if _set_outside is None:
    del os.environ["TRITON_INTERPRET"]  # not for the processes that other tests start

import kernel_cases as cases  # noqa: E402
import kernel_comparison as comparison  # noqa: E402
from drawn_cases import any_sizes  # noqa: E402
from hybrid_moe_kernels import causal_conv, norm, registry, tile  # noqa: E402
from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as some  # noqa: E402

pytestmark = pytest.mark.skipif(not tile.INTERPRETED, reason="triton was imported before, without its interpreter")


def module_of(case: comparison.Case):
    return KERNELS[case.op.partition(".")[0]]


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_a_kernel_computes_the_reference_in_float32(case):
    comparison.check(case, module_of(case), torch.float32)


@pytest.mark.full
@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_a_kernel_computes_the_reference_in_bfloat16(case):
    comparison.check(case, module_of(case), torch.bfloat16)


@pytest.mark.parametrize("case", cases.EMPTY, ids=str)
def test_no_tokens_launch_nothing(case, monkeypatch):
    def launched(self, *args, **options):
        raise AssertionError(f"{case}: a kernel was launched")

    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", launched)
    comparison.check(case, module_of(case), torch.float32)


def test_a_slot_below_zero_fills_up_a_batch_and_touches_nothing():
    for case in (cases.conv_update(1, 3, 13, 4, True), cases.gdn_decode(2, 3, 1, 2, 16, 16, 4)):
        want = comparison.reference(case, torch.float64)
        args = case.inputs(torch.float32, "cpu")
        slots = args[-1]
        before = [args[place].clone() for place in case.states]
        kept, slots[1] = slots[1].item(), -1
        with comparison.poisoned():
            y = getattr(module_of(case), case.op.rpartition(".")[2])(*args, **case.options)
        assert not y[1].any() and comparison.error(y[[0, 2]], want[0][[0, 2]]) < 5e-6, str(case)
        for place, old in zip(case.states, before, strict=True):
            assert torch.equal(args[place][kept], old[kept]), str(case)


def test_the_registry_runs_triton_on_a_cpu_only_when_told_to():
    case = cases.SMALL[0]
    assert causal_conv.prefill.pick("cpu", torch.float32).backend == "torch"
    with registry.using("triton"):
        assert causal_conv.prefill.pick("cpu", torch.float32).backend == "triton"
        assert causal_conv.prefill.pick("cpu", torch.float64).backend == "torch"
        y = causal_conv.prefill(*case.inputs(torch.float32, "cpu"))
        with pytest.raises(ValueError, match=r"weight_CW: the shape is \[12, 4\], but must be \[C = 13, W\]"):
            args = case.inputs(torch.float32, "cpu")
            causal_conv.prefill(args[0], args[1][1:], *args[2:])
    assert comparison.error(y, comparison.reference(case, torch.float64)[0]) < 5e-6


def test_without_a_gpu_or_the_interpreter_one_line_says_what_runs_instead(monkeypatch, caplog):
    monkeypatch.setattr(tile, "INTERPRETED", False)
    monkeypatch.setattr(KERNELS["norm"], "missing", tile.missing.__wrapped__)
    monkeypatch.setattr(registry, "_logged", set())
    x = torch.ones(2, 8)
    with registry.using("triton"):
        for _ in range(2):
            assert norm.rms_norm.pick("cpu", torch.float32).backend == "torch"
            assert norm.norm_then_gate(x, x, torch.ones(8), 1e-6).shape == (2, 8)
    assert [record.message for record in caplog.records] == [
        "kernels: triton: there is no CUDA device, and TRITON_INTERPRET=1 was not set before the start; "
        "torch runs instead"
    ]


@contextlib.contextmanager
def peer(package: str, module: str):
    """The op's module of another project's kernels, which set-up keeps apart; no other test sees it."""
    folder = Path(sys.prefix, "oracles")
    if not (folder / package).is_dir():
        pytest.skip(f"{package} is not installed")
    before, there = dict(sys.modules), os.environ.get("TRITON_INTERPRET")
    sys.path.insert(0, str(folder))
    os.environ["TRITON_INTERPRET"] = "1"
    sys.modules.pop(package, None)  # may be None, which keeps transformers from finding it
    if package == "mamba_ssm":
        sys.modules[package] = types.ModuleType(package)  # its own __init__ needs a GPU
        sys.modules[package].__path__ = [str(folder / package)]
    try:
        yield importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} does not import on a CPU: {error}")
    finally:
        sys.path.remove(str(folder))
        if there is None:
            del os.environ["TRITON_INTERPRET"]
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("fla", "mamba_ssm", "einops") or name == module:
                del sys.modules[name]
        if package in before:
            sys.modules[package] = before[package]


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])  # without and with limits of the time step
def test_mamba_ssms_decode_is_called_as_it_wants_to_be(seed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    case = cases.ssd_decode(seed, B=2, G=2, R=3, P=12, N=20, W=4, bias=True, norm=True)
    with peer("mamba_ssm", "hybrid_moe_kernels.ssd.mamba_ssm") as module:
        comparison.check(case, module, torch.float32)


@pytest.mark.full
@pytest.mark.timeout(600)  # its import brings torch's compiler with it
def test_flas_decode_is_called_as_it_wants_to_be(monkeypatch):
    """But for its gated norm, which is tuned on a device and so needs one."""
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    case = cases.gdn_decode(3, B=2, M=2, R=2, K=16, V=16, W=4)
    with peer("fla", "hybrid_moe_kernels.gated_delta_rule.fla") as module:
        plain = importlib.import_module("hybrid_moe_kernels.norm.reference").norm_then_gate
        monkeypatch.setattr(module, "rms_norm_gated", lambda x, z, weight, bias, eps: plain(x, z, weight, eps))
        comparison.check(case, module, torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        cases.gdn_decode(20, B=1, M=1, R=2, K=16, V=16, W=2),
        cases.ssd_decode(21, B=1, G=1, R=2, P=8, N=16, W=2, bias=True, norm=True),
    ],
    ids=str,
)
def test_a_decode_step_is_one_launch(case, monkeypatch):
    launched, launch = [], triton.runtime.interpreter.GridExecutor.__call__

    def count(self, *args, **options):
        launched.append(self.fn.__name__)
        return launch(self, *args, **options)

    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", count)
    comparison.check(case, module_of(case), torch.float32)
    assert launched == ["_decode"]


LENGTHS = some.lists(some.sampled_from([0, 1, 2, 3, 31, 32, 33, 65, 130]) | some.integers(0, 12), max_size=3)
DRAWN = any_sizes(LENGTHS, rows=some.integers(0, 20), most=32)
for case in cases.WITHOUT_TRITON:
    del DRAWN[case.op]


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("op", DRAWN)
def test_any_sizes_in_float32(op):
    @seed(1)
    @settings(max_examples=500, derandomize=False, database=None, suppress_health_check=list(HealthCheck))
    @given(DRAWN[op])
    def run(case):
        comparison.check(case, module_of(case), torch.float32)

    run()


@pytest.mark.full
def test_strong_decays_lose_no_bits_in_long_sums():
    case = cases.gdn_prefill(5428, [3, 3, 31], M=1, R=1, K=1, V=12, repeated=True)  # found by the sweep above
    comparison.check(case, module_of(case), torch.float32)


@pytest.mark.full
def test_states_of_small_heads_keep_their_bits_in_bfloat16():
    for case in (  # found by a sweep in which products were of float16
        cases.gdn_prefill(30, [31, 90, 0], M=1, R=2, K=1, V=26),
        cases.gdn_prefill(45, [64, 65], M=2, R=1, K=5, V=22, repeated=True),
        cases.gdn_prefill(14, [90], M=1, R=2, K=64, V=17, repeated=True),
    ):
        comparison.check(case, module_of(case), torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("length", [257, 2000])
def test_long_prompts(length):
    for case in (
        cases.gdn_prefill(length, [length, 3], M=1, R=1, K=16, V=16),
        cases.ssd_prefill(length, [3, length], G=1, R=1, P=16, N=16),
        cases.conv_prefill(length, [length, 3], C=8, W=4, bias=True),
    ):
        comparison.check(case, module_of(case), torch.float32)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_every_kernel_compiles_for_an_h200_and_fits(dtype, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_registers.py"
    command = [sys.executable, script, "--dtype", dtype, "--json", tmp_path / "rows.json"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {row["op"].partition(",")[0].partition(" ")[0] for row in rows} >= set(DRAWN), run.stdout
    for row in rows:
        assert row["programs_per_multiprocessor"] >= 1, row
        if dtype == "bf16" and not row["op"].endswith(".prefill"):  # the two scans do spill: see the report
            assert row["spilt_bytes"] == 0, row
