"""The C++ kernels against the definitions in float64, for every instruction set that this processor has.

The full suite builds the library, once per source, into the user's cache; without it all are skipped by name.
Exact sizes, odd sizes, ragged lengths, rows that lie apart. In bfloat16 the error must not exceed 1.2 times the
reference's own. Lengths and sizes are drawn by hypothesis: few here, HMR_CASES of each op under `full`.
"""

import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_moe_kernels import attention, causal_conv, gated_delta_rule, linear, moe, native, norm, registry, rope, ssd
from hybrid_moe_kernels.linear import native as linear_native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import need_native, poisoned
from torch import Tensor

from hybrid_moe_ref import HybridMoE, preset
from hybrid_moe_ref.config import ModelConfig

OPS = {
    op.name: op
    for op in (
        attention.decode,
        gated_delta_rule.prefill,
        gated_delta_rule.decode,
        ssd.prefill,
        ssd.decode,
        causal_conv.prefill,
        causal_conv.update,
        moe.experts,
        moe.mixture,
        norm.rms_norm,
        norm.norm_then_gate,
        norm.gate_then_norm,
        rope.rotate,
        linear.project,
    )
}
FULL_CASES = int(os.environ.get("HMR_CASES", "500"))


@dataclass
class Case:
    """A call: its arguments, options, and which of the arguments are states, and wide in every dtype."""

    args: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    states: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()
    tolerance: float = 5e-6

    def cast(self, dtype: torch.dtype) -> list[Any]:
        """The arguments in `dtype`, each with memory of its own."""

        def one(index: int, x: Any) -> Any:
            if isinstance(x, list):
                return [one(index, y) for y in x]
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x.clone() if isinstance(x, Tensor) else x
            wanted = torch.promote_types(dtype, torch.float32) if index in self.wide else dtype
            return as_strided_like(x.to(wanted), x)

        return [one(index, x) for index, x in enumerate(self.args)]


def as_strided_like(x: Tensor, like: Tensor) -> Tensor:
    """A copy of x whose rows lie as far apart as those of `like`."""
    y = torch.empty_strided(like.shape, like.stride(), dtype=x.dtype)
    return y.copy_(x)


class Draw:
    """Random tensors; two-dimensional and larger ones have gaps between their rows when `gap` is not 0."""

    def __init__(self, seed: int, gap: int = 0) -> None:
        self.r, self.gap = torch.Generator().manual_seed(seed), gap

    def normal(self, *shape: int, gap: bool = True) -> Tensor:
        x = torch.randn(shape, generator=self.r)
        if not (gap and self.gap and x.dim() > 1):
            return x
        row = x[0].numel() if shape[0] else 1
        holder = torch.full((max(shape[0], 1), row + self.gap), torch.nan)
        inner = holder.as_strided(shape, (row + self.gap, *x.stride()[1:]))
        return inner.copy_(x)

    def weight(self, *shape: int) -> Tensor:
        return self.normal(*shape, gap=False) * shape[-1] ** -0.5

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.r)

    def slots(self, count: int, of: int) -> Tensor:
        return torch.randperm(of, generator=self.r)[:count]


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def attention_decode(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    """The pages of a sequence lie anywhere in the pool."""
    B, L, longest = len(lengths), 1 + K % 24, max([1, *lengths])
    X = -(-longest // L)
    kv, table = r.normal(B * X + 1, L, 2, heads, V), r.slots(B * X, B * X + 1).view(B, X)
    counts = torch.tensor([max(1, length) for length in lengths], dtype=torch.long)
    return Case([r.normal(B, heads * repeat, V), kv, table, counts, longest])


def delta_prefill(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    T, B, M, H = sum(lengths), len(lengths), heads, heads * repeat
    q, k, v = r.normal(T, M, K), r.normal(T, M, K), r.normal(T, H, V)
    args = [
        q,
        k,
        v,
        -3 * r.uniform(T, H),
        r.uniform(T, H),
        r.normal(B + 1, H, K, V),
        r.slots(B, B + 1),
        starts(lengths),
    ]
    return Case(args, states=(5,), wide=(3, 4, 5))


def delta_decode(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    B, M, H, W = len(lengths), heads, heads * repeat, 2 + K % 3
    C = 2 * M * K + H * V
    args = [r.normal(B, C), r.normal(B, H, V), r.normal(B, H), r.normal(B, H), r.weight(C, W)]
    args += [(1 + 15 * r.uniform(H)).log(), r.normal(H), r.normal(V), r.normal(B + 1, W - 1, C)]
    args += [r.normal(B + 1, H, K, V), r.slots(B, B + 1)]
    return Case(args, {"num_key_heads": M, "eps": 1e-6}, states=(8, 9), wide=(9,))


def scan_prefill(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    T, B, G, H = sum(lengths), len(lengths), heads, heads * repeat
    args = [r.normal(T, H, V), r.uniform(T, H), -16 * r.uniform(H), r.normal(T, G, K), r.normal(T, G, K), r.normal(H)]
    return Case([*args, r.normal(B + 1, H, V, K), r.slots(B, B + 1), starts(lengths)], states=(6,), wide=(1, 2, 6))


def scan_decode(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    B, G, H, W = len(lengths), heads, heads * repeat, 2 + K % 3
    C = H * V + 2 * G * K
    args: list[Any] = [r.normal(B, C), r.normal(B, H * V), r.normal(B, H), r.weight(C, W)]
    args += [r.normal(C) if K % 2 else None, (1 + 15 * r.uniform(H)).log(), r.normal(H), r.normal(H)]
    args += [r.normal(H * V) if V % 2 else None, r.normal(B + 1, W - 1, C), r.normal(B + 1, H, V, K), r.slots(B, B + 1)]
    limit = (0.0, None) if K % 2 else (0.1, 0.5)
    return Case(args, {"num_groups": G, "dt_limit": limit, "eps": 1e-6}, states=(9, 10), wide=(10,))


def conv_prefill(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    T, B, C, W = sum(lengths), len(lengths), heads * repeat * V, 1 + K % 5
    bias = r.normal(C) if K % 2 else None
    state = r.normal(B + 1, W - 1, C)
    return Case([r.normal(T, C), r.weight(C, W), bias, state, r.slots(B, B + 1), starts(lengths)], states=(3,))


def conv_update(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    case = conv_prefill(r, [1] * len(lengths), heads, repeat, K, V)
    return Case(case.args[:5], states=(3,))


def experts(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    N, H, I, E, top_k = sum(lengths), K, V, 3 * heads + 1, repeat
    ids = torch.randint(-1, E + 1, (N, top_k), generator=r.r)  # some are held elsewhere
    return Case([r.normal(N, H), r.uniform(N, top_k), ids, r.weight(E, 2 * I, H), r.weight(E, H, I)], wide=(1,))


def mixture(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    N, H, I, E, S = sum(lengths), K, V, 3 * heads + 1, V // 2 + 1
    # The first feature's sign says which experts are chosen, by so much that no rounding changes the choice.
    x, router = r.normal(N, H), 0.002 * r.normal(E, H, gap=False)
    x[:, 0] = x[:, 0].sign() + (x[:, 0] == 0)
    router[:, 0] = torch.randperm(E, generator=r.r) / 2 - E / 4
    weights = [router, r.weight(E, 2 * I, H), r.weight(E, H, I), r.weight(S, H), r.weight(S, H), r.weight(H, S)]
    return Case([x, *weights, r.weight(1, H)], {"top_k": 1 + (K + V) % E})


def rms_norm(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    return Case([r.normal(sum(lengths), V), r.normal(V), 1e-6])


def norm_then_gate(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    return Case([r.normal(sum(lengths), V), r.normal(sum(lengths), V), r.normal(V), 1e-6])


def gate_then_norm(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    T, size = sum(lengths), heads * V
    return Case([r.normal(T, size), r.normal(T, size), r.normal(size), heads, 1e-6])


def rotate(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    T, R = sum(lengths), V // 2
    angles = 6.3 * r.uniform(T, R)
    return Case([r.normal(T, heads, V), angles.cos(), angles.sin()])


def project(r: Draw, lengths: list[int], heads: int, repeat: int, K: int, V: int) -> Case:
    return Case([r.normal(sum(lengths), K), [r.weight(size, K) for size in (V, 1, heads * 16)]])


MAKERS: dict[str, Callable[..., Case]] = {
    "attention.decode": attention_decode,
    "gated_delta_rule.prefill": delta_prefill,
    "gated_delta_rule.decode": delta_decode,
    "ssd.prefill": scan_prefill,
    "ssd.decode": scan_decode,
    "causal_conv.prefill": conv_prefill,
    "causal_conv.update": conv_update,
    "moe.experts": experts,
    "moe.mixture": mixture,
    "norm.rms_norm": rms_norm,
    "norm.norm_then_gate": norm_then_gate,
    "norm.gate_then_norm": gate_then_norm,
    "rope.rotate": rotate,
    "linear.project": project,
}


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Any:
    need_native(request)
    best, num_threads = native.library().instruction_set(), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other are most of the time
    max_rows, linear_native.MAX_ROWS = linear_native.MAX_ROWS, dict.fromkeys(native.DTYPES, 1 << 62)
    yield native.library()
    linear_native.MAX_ROWS = max_rows
    torch.set_num_threads(num_threads)
    native.library().use_instruction_set(best)


def call(op: registry.Op, backend: str, args: list[Any], options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    found = op.implementation(backend, "cpu", dtype)
    assert found is not None, f"{op.name} has no {backend} implementation for {dtype}"
    y = found.run(*args, **options)
    return list(y) if isinstance(y, list | tuple) else [y]


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    if not want.numel():
        return 0.0
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def sensitivity(op: registry.Op, case: Case, dtype: torch.dtype, want: list[Tensor]) -> list[float]:
    """How far results move in float64 when every argument's numbers change by up to a rounding to `dtype`, the largest
    of four times: a few different numbers may be what large ones leave when they cancel."""
    moved, r = [0.0] * len(want), torch.Generator().manual_seed(0)
    for _ in range(4):
        args = case.cast(torch.float64)
        for x in [y for arg in args for y in (arg if isinstance(arg, list) else [arg])]:
            if isinstance(x, Tensor) and x.is_floating_point():
                x.mul_(1 + torch.finfo(dtype).eps * (torch.rand(x.shape, generator=r) - 0.5))
        got = call(op, "torch", args, case.options, torch.float64) + [args[i] for i in case.states]
        moved = [max(before, error(x, truth)) for before, x, truth in zip(moved, got, want, strict=True)]
    return moved


def prove(name: str, case: Case, dtype: torch.dtype, about: str) -> None:
    """Outputs and states of the native op are close to float64. A few different numbers are allowed four times what a
    rounding of the arguments does to them."""
    op, args = OPS[name], case.cast(dtype)
    given = Case(args, case.options, case.states, case.wide)
    exact, theirs = given.cast(torch.float64), given.cast(dtype)
    want = call(op, "torch", exact, case.options, torch.float64) + [exact[i] for i in case.states]
    reference = call(op, "torch", theirs, case.options, dtype) + [theirs[i] for i in case.states]
    few = any(truth.unique().numel() < 100 for truth in want)
    moved = sensitivity(op, given, dtype, want) if few else [0.0] * len(want)
    with poisoned():
        got = call(op, "native", args, case.options, dtype) + [args[i] for i in case.states]
    for index, (mine, yours, truth, shift) in enumerate(zip(got, reference, want, moved, strict=True)):
        assert mine.dtype == yours.dtype, f"{name} result {index}, {about}"
        limit = case.tolerance
        if dtype == torch.bfloat16:
            limit += 1.2 * error(yours, truth)
            if mine.dtype == dtype and mine.numel() < 2000:
                # A short result rounds by luck: it is allowed its own rounding, and one of what it is made of.
                limit = max(limit, 2.0**-8)
        if truth.unique().numel() < 100:
            limit = max(limit, 4 * shift)
        assert error(mine, truth) <= limit, f"{name} result {index}: {error(mine, truth):.2e} > {limit:.2e}, {about}"


SIZES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 17, 64, 65, 130]), min_size=1, max_size=4)
        | st.lists(st.integers(0, 3), min_size=5, max_size=12),
        "heads": st.integers(1, 3),
        "repeat": st.integers(1, 3),
        "K": st.integers(1, 70),
        "V": st.integers(1, 70),
    }
)


def prove_drawn(name: str, library: Any, seed: int, gap: int, sizes: dict[str, Any]) -> None:
    torch.set_num_threads(1 + seed % 2)
    for isa in library.instruction_sets():
        library.use_instruction_set(isa)
        for dtype in native.DTYPES:
            prove(name, MAKERS[name](Draw(seed, gap), **sizes), dtype, f"{isa} {dtype} seed {seed} gap {gap} {sizes}")


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), gap=st.sampled_from([0, 3]), sizes=SIZES)
def test_op_is_its_definition(name: str, library: Any, seed: int, gap: int, sizes: dict[str, Any]) -> None:
    prove_drawn(name, library, seed, gap, sizes)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", OPS)
@settings(max_examples=FULL_CASES, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**31), gap=st.sampled_from([0, 3]), sizes=SIZES)
def test_op_is_its_definition_many_cases(name: str, library: Any, seed: int, gap: int, sizes: dict[str, Any]) -> None:
    prove_drawn(name, library, seed, gap, sizes)


@pytest.mark.full
@pytest.mark.parametrize("name", ["gated_delta_rule.prefill", "ssd.prefill", "causal_conv.prefill"])
@pytest.mark.parametrize("seed", range(FULL_CASES // 5))
def test_lengths_up_to_two_thousand(name: str, library: Any, seed: int) -> None:
    lengths = torch.randint(1, 2001, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    sizes = {"lengths": lengths, "heads": 1 + seed % 2, "repeat": 2, "K": 16 + seed % 20, "V": 24}
    for dtype in native.DTYPES:
        prove(name, MAKERS[name](Draw(seed), **sizes), dtype, f"{dtype} seed {seed} {sizes}")


@pytest.mark.parametrize("name", OPS)
def test_a_nan_reaches_whatever_depends_on_it(name: str, library: Any) -> None:
    """What depends on an element is what changes with it in float64."""
    case = MAKERS[name](Draw(3), lengths=[3, 2], heads=2, repeat=2, K=21, V=24)

    def results(backend: str, dtype: torch.dtype, change: tuple[int, float] | None) -> list[Tensor]:
        args = Case(case.args, wide=case.wide).cast(dtype)
        if change is not None:
            x = args[change[0]][0] if isinstance(args[change[0]], list) else args[change[0]]
            x[tuple(size // 2 for size in x.shape)] += change[1]
        return call(OPS[name], backend, args, case.options, dtype) + [args[i] for i in case.states]

    before = results("torch", torch.float64, None)
    for place, arg in enumerate(case.args):
        arg = arg[0] if isinstance(arg, list) else arg
        if not isinstance(arg, Tensor) or not arg.is_floating_point():
            continue
        after = results("torch", torch.float64, (place, 1.0))
        for isa in library.instruction_sets():
            library.use_instruction_set(isa)
            for dtype in native.DTYPES:
                got = results("native", dtype, (place, torch.nan))
                for number, (mine, a, b) in enumerate(zip(got, before, after, strict=True)):
                    lost = ~mine.isnan() & (a != b)
                    assert not lost.any(), f"{name} argument {place}, result {number}, {isa} {dtype}: {lost.nonzero()}"


@pytest.mark.parametrize(("name", "places"), [("gated_delta_rule.prefill", (0, 1, 2)), ("ssd.prefill", (0, 3, 4))])
def test_heads_may_lie_apart(name: str, places: tuple[int, ...], library: Any) -> None:
    case = MAKERS[name](Draw(5), lengths=[7, 2], heads=2, repeat=2, K=9, V=12)
    for place in places:
        x = case.args[place]
        case.args[place] = torch.full((*x.shape[:2], x.shape[2] + 3), torch.nan)[..., : x.shape[2]].copy_(x)
    OPS[name].check(*case.args)
    prove(name, case, torch.float32, "heads apart")


@pytest.mark.parametrize("name", OPS)
def test_no_tokens_at_all(name: str, library: Any) -> None:
    sizes = {"lengths": [0] if "decode" not in name and "update" not in name else [], "heads": 2, "repeat": 2}
    prove(name, MAKERS[name](Draw(1), **sizes, K=8, V=16), torch.float32, "no tokens")


def test_other_threads_run_during_a_native_call(library: Any) -> None:
    x, weight, span = torch.ones(256, 1024), torch.ones(2048, 1024), [0.0, 0.0]

    def call_it() -> None:
        span[0] = time.monotonic()
        library.project(x, [weight])
        span[1] = time.monotonic()

    for _ in range(10):  # on a busy machine this thread may get no processor for one of them
        seen: list[float] = []
        worker = threading.Thread(target=call_it)
        worker.start()
        while worker.is_alive():
            seen.append(time.monotonic())
        quarter = (span[1] - span[0]) / 4
        if any(span[0] + quarter < at < span[1] - quarter for at in seen):
            return
    pytest.fail("no other thread ran in the middle of any of ten calls")


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_bad_argument_is_named_with_both_values(backend: str, library: Any) -> None:
    good = delta_prefill(Draw(0), [2, 3], 2, 2, 8, 16).args
    bad = {
        r"k_TMK: shape \[5, 2, 7\], wanted \[T = 5, M = 2, K = 8\]": (1, good[1][..., :7].clone()),
        r"v_THV: dtype float64, wanted float32": (2, good[2].double()),
        r"H: 3, wanted a multiple of M = 2": (2, good[2][:, :3].clone()),
        r"state_JHKV: dtype bfloat16, wanted float32": (5, good[5].bfloat16()),
        r"state_JHKV: strides \[512, 128, 1, 8\], wanted the last 3 dimensions contiguous": (
            5,
            torch.zeros(3 * 512).as_strided((3, 4, 8, 16), (512, 128, 1, 8)),
        ),
        r"slots_B: dtype int32, wanted int64": (6, good[6].int()),
        r"slots_B: index 3, wanted 0 to 2": (6, torch.tensor([0, 3])),
        r"slots_B: index 1 appears 2 times, wanted once": (6, torch.tensor([1, 1])),
        r"cu_seqlens_X: from 0 to 4, wanted 0 to 5": (7, torch.tensor([0, 2, 4])),
        r"cu_seqlens_X: 5 after 7, wanted numbers that never fall": (7, torch.tensor([0, 7, 5])),
        r"cu_seqlens_X: shape \[2\], wanted \[X = 3\]": (7, torch.tensor([0, 5])),
    }
    with registry.using(backend):
        gated_delta_rule.prefill(*good)
        for text, (index, value) in bad.items():
            with pytest.raises(ValueError, match=text):
                gated_delta_rule.prefill(*good[:index], value, *good[index + 1 :])
        with pytest.raises(ValueError, match=r"g_TH: device meta, wanted cpu"):
            gated_delta_rule.prefill(*good[:3], good[3].to("meta"), *good[4:])
        with pytest.raises(ValueError, match=r"gate_up_EJH: J = 8, wanted 2 I = 10"):
            moe.experts(
                torch.ones(1, 3), torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(2, 8, 3), torch.ones(2, 3, 5)
            )


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


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=300
    )


CALL = """
import torch
from hybrid_moe_kernels import norm, registry
registry.prepare()
print(round(norm.rms_norm(torch.ones(2, 4), torch.zeros(4), 1e-6).sum().item()), registry.table()["norm.rms_norm"])
"""


def test_without_a_compiler_torch_runs_and_one_line_says_so(tmp_path) -> None:
    done = run_python(CALL, HMR_KERNELS="native", HMR_NATIVE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert (done.returncode, done.stdout) == (0, "8 torch\n"), done.stderr
    assert done.stderr.count("\n") == 1 and "there is no C++ compiler ('no-such-compiler'" in done.stderr


@pytest.mark.full
def test_a_failed_build_leaves_nothing_behind(tmp_path) -> None:
    if shutil.which("ninja") is None:
        pytest.skip("native kernels: ninja is not installed")
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "x.cpp:1: error: broken"\nexit 1\n'
    )
    compiler.chmod(0o755)
    cache = tmp_path / "cache"
    done = run_python(CALL, HMR_KERNELS="native", HMR_NATIVE_DIR=str(cache), CXX=str(compiler))
    assert (done.returncode, done.stdout) == (0, "8 torch\n"), done.stderr
    assert "kernels: native: the build failed: x.cpp:1: error: broken; torch runs instead" in done.stderr
    assert done.stderr.count("kernels:") == 1 and list(cache.iterdir()) == []


@pytest.mark.full
@pytest.mark.skipif(platform.machine() != "x86_64", reason="AMX is of x86")
def test_products_by_amx_are_right_where_its_instructions_are_emulated(tmp_path: Path) -> None:
    """With the address sanitizer: what is read or written beyond rows ends the program."""
    compiler, source = os.environ.get("CXX", "c++"), Path(__file__).with_name("amx_emulated.cpp")
    if shutil.which(compiler) is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path / "amx_emulated"
    flags = [
        "-O1",
        "-std=c++20",
        "-fopenmp",
        "-Wno-psabi",
        "-fsanitize=address,undefined",
        f"-I{Path(native.__file__).parent}",
    ]
    subprocess.run([compiler, *flags, source, "-o", program], check=True, capture_output=True, text=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (0, "200 products\n"), run.stdout + run.stderr
