"""The chunked forms equal the token-by-token definitions in float64, from any state, cut anywhere.

Shapes: B batch, T time, H heads, K key dim, V value dim, P head dim, G groups, N state size.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hybrid_moe_kernels.causal_conv.reference import causal_conv
from hybrid_moe_kernels.gated_delta_rule.reference import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hybrid_moe_kernels.linear import reference as linear
from hybrid_moe_kernels.moe.reference import expert_by_expert, experts, pick_by_pick
from hybrid_moe_kernels.ssd.reference import chunk_ssd, recurrent_ssd
from torch import Tensor

LENGTHS = [1, 2, 7, 63, 64, 65, 130, 200]


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert torch.isfinite(error) and error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance}"


def delta_rule_inputs(seed: int, T: int, dtype: torch.dtype) -> list[Tensor]:
    B, H, K, V = 2, 3, 16, 24
    r = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(B, T, H, K, generator=r), dim=-1) for _ in range(2))
    v = torch.randn(B, T, H, V, generator=r)
    g = -torch.rand(B, T, H, generator=r) * torch.tensor([0.01, 0.5, 5.0])
    beta = torch.rand(B, T, H, generator=r)
    state = torch.randn(B, H, K, V, generator=r)
    return [x.to(dtype) for x in (q, k, v, g, beta, state)]


def ssd_inputs(seed: int, T: int, dtype: torch.dtype) -> list[Tensor]:
    B, H, P, G, N = 2, 4, 8, 2, 16
    r = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, H, P, generator=r)
    dt = torch.rand(B, T, H, generator=r)
    A = -torch.tensor([0.01, 0.5, 4.0, 16.0])
    b, c = (torch.randn(B, T, G, N, generator=r) for _ in range(2))
    D = torch.randn(H, generator=r)
    state = torch.randn(B, H, P, N, generator=r)
    return [z.to(dtype) for z in (x, dt, A, b, c, D, state)]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_delta_rule_equals_the_float64_recurrence(T: int, dtype: torch.dtype) -> None:
    inputs = delta_rule_inputs(T, T, torch.float32)
    want = recurrent_gated_delta_rule(*(x.double() for x in inputs))
    got = chunk_gated_delta_rule(*(x.to(dtype) for x in inputs))
    for name, a, b in zip(["output", "state"], got, want, strict=True):
        assert a.dtype == dtype
        close(a, b, 5e-6 if dtype == torch.float32 else 1e-13, f"{name}, T {T}")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunked_ssd_equals_the_float64_recurrence(T: int, dtype: torch.dtype) -> None:
    inputs = ssd_inputs(T, T, torch.float32)
    want = recurrent_ssd(*(x.double() for x in inputs))
    got = chunk_ssd(*(x.to(dtype) for x in inputs))
    for name, a, b in zip(["output", "state"], got, want, strict=True):
        assert a.dtype == dtype
        close(a, b, 5e-6 if dtype == torch.float32 else 1e-13, f"{name}, T {T}")


@pytest.mark.parametrize("log_decay", [-20.0, -3000.0, -math.inf])
def test_what_comes_after_strong_decays_keeps_its_digits(log_decay: float) -> None:
    """A state that is forgotten leaves no rounding behind."""
    q, k, v, g, beta, state = delta_rule_inputs(3, 64, torch.float32)
    g[:, :16], g[:, 16:] = log_decay, -0.01
    inputs = q, k, v, g, beta, state
    want = recurrent_gated_delta_rule(*(x.double() for x in inputs))
    got = chunk_gated_delta_rule(*inputs)
    close(got[0][:, 16:], want[0][:, 16:], 5e-6, f"delta rule output after {log_decay}")
    close(got[1], want[1], 5e-6, f"delta rule state, {log_decay}")

    x, dt, A, *rest = ssd_inputs(3, 64, torch.float32)
    dt[:, :32], dt[:, 32:] = max(-log_decay, 1.0) if log_decay > -math.inf else 1e4, 0.01
    inputs = x, dt, A, *rest
    want = recurrent_ssd(*(z.double() for z in inputs))
    got = chunk_ssd(*inputs)
    close(got[0][:, 32:], want[0][:, 32:], 5e-6, f"ssd output after {log_decay}")
    close(got[1], want[1], 5e-6, f"ssd state, {log_decay}")


@pytest.mark.parametrize("chunk_size", [1, 16, 33, 500])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    inputs = delta_rule_inputs(5, 100, torch.float64)
    close(
        chunk_gated_delta_rule(*inputs, chunk_size=chunk_size)[0],
        recurrent_gated_delta_rule(*inputs)[0],
        1e-13,
        "o",
    )
    inputs = ssd_inputs(5, 100, torch.float64)
    close(chunk_ssd(*inputs, chunk_size=chunk_size)[0], recurrent_ssd(*inputs)[0], 1e-13, "y")


@pytest.mark.parametrize("cut", [1, 5, 64, 99])
def test_state_carries_a_sequence_over_any_cut(cut: int) -> None:
    def cut_time(inputs: list[Tensor], times: slice) -> list[Tensor]:
        return [x[:, times] if x.dim() > 2 else x for x in inputs]

    *inputs, state = delta_rule_inputs(7, 100, torch.float64)
    want, end = chunk_gated_delta_rule(*inputs, state)
    first, middle = chunk_gated_delta_rule(*cut_time(inputs, slice(cut)), state)
    second, last = chunk_gated_delta_rule(*cut_time(inputs, slice(cut, None)), middle)
    close(torch.cat([first, second], 1), want, 1e-13, "delta rule output")
    close(last, end, 1e-13, "delta rule state")

    *inputs, state = ssd_inputs(7, 100, torch.float64)
    want, end = chunk_ssd(*inputs, state)
    first, middle = chunk_ssd(*cut_time(inputs, slice(cut)), state)
    second, last = chunk_ssd(*cut_time(inputs, slice(cut, None)), middle)
    close(torch.cat([first, second], 1), want, 1e-13, "ssd output")
    close(last, end, 1e-13, "ssd state")


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_causal_conv_is_its_definition_and_carries_its_state(width: int, with_bias: bool) -> None:
    r = torch.Generator().manual_seed(width)
    x, weight = torch.randn(2, 9, 5, generator=r), torch.randn(5, width, generator=r)
    bias = torch.randn(5, generator=r) if with_bias else None
    state = torch.randn(2, width - 1, 5, generator=r)
    past = torch.cat([state, x], dim=1)
    rows = [(past[:, t : t + width] * weight.T).sum(1) + (bias if with_bias else 0) for t in range(9)]
    got, end = causal_conv(x, weight, bias, state)
    close(got, F.silu(torch.stack(rows, 1)), 1e-6, "output")
    assert torch.equal(end, past[:, 9:])

    one, middle = causal_conv(x[:, :1], weight, bias, state)
    rest, last = causal_conv(x[:, 1:], weight, bias, middle)
    close(torch.cat([one, rest], 1), got, 1e-6, "output in two parts")
    assert torch.equal(last, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(24, 16), (20, 12)])  # aligned for torch's grouped product, and not
@pytest.mark.parametrize("num_rows", [0, 1, 3, 60])
def test_experts_are_their_definition_whichever_way(dtype: torch.dtype, sizes: tuple[int, int], num_rows: int) -> None:
    (H, I), E, K = sizes, 6, 3
    r = torch.Generator().manual_seed(num_rows)
    x, weights = torch.randn(num_rows, H, generator=r).to(dtype), torch.rand(num_rows, K, generator=r)
    ids = torch.randint(-2, E + 2, (num_rows, K), generator=r)  # some are held elsewhere
    gate_up, down = torch.randn(E, 2 * I, H, generator=r).to(dtype), torch.randn(E, H, I, generator=r).to(dtype)
    want = torch.zeros(num_rows, H, dtype=torch.float64)
    for n in range(num_rows):
        for w, e in zip(weights[n].double(), ids[n].tolist(), strict=True):
            if 0 <= e < E:
                gate, up = (gate_up[e].double() @ x[n].double()).chunk(2)
                want[n] += w * (down[e].double() @ (F.silu(gate) * up))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    got = experts(x, weights, ids, gate_up, down)
    assert got.dtype == dtype and got.shape == (num_rows, H)
    for per_pick in (pick_by_pick, expert_by_expert):
        out = per_pick(x, ids, gate_up, down).double().view(num_rows, K, H)
        for y in (got, (out * weights[..., None]).sum(1)):
            assert (y - want).norm() <= tolerance * want.norm(), f"{per_pick.__name__}, {num_rows} rows"


@pytest.mark.parametrize(("threads", "num_parts"), [(1, 1), (2, 2), (12, 8)])
@pytest.mark.parametrize("num_rows", [0, 1, 5, linear.MAX_ROWS, linear.MAX_ROWS + 1])
def test_a_product_is_the_same_for_any_rows_and_threads(
    threads: int, num_parts: int, num_rows: int, monkeypatch
) -> None:
    r = torch.Generator().manual_seed(num_rows)
    weights = [torch.randn(O, 256, generator=r) for O in (512, 513, 8)]  # in parts, odd, too small
    weights.append(torch.randn(256, 512, generator=r).mT)  # not dense
    x = torch.randn(num_rows, 256, generator=r)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    parts = []
    monkeypatch.setattr(torch, "bmm", lambda a, b, bmm=torch.bmm: parts.append(len(a)) or bmm(a, b))
    for got, weight in zip(linear.project(x, weights), weights, strict=True):
        assert got.is_contiguous(), (threads, num_rows)
        torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
    assert parts == ([num_parts] if num_parts > 1 and 0 < num_rows <= linear.MAX_ROWS else [])


def test_input_dtype_comes_back_and_arithmetic_is_wider() -> None:
    inputs = delta_rule_inputs(1, 70, torch.bfloat16)
    for rule in (recurrent_gated_delta_rule, chunk_gated_delta_rule):
        o, state = rule(*inputs)
        assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
