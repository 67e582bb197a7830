"""Random inputs for every kernel: one function per operation that draws a call, and lists of such calls."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from kernel_comparison import Case, check, module_of
from torch import Tensor


def _rows(r: torch.Generator, lengths: list[int], num_spare: int = 2) -> tuple[Tensor, Tensor, int]:
    """Return slots and starts of sequences, and the number of slots."""
    num_slots = len(lengths) + num_spare
    slots = torch.randperm(num_slots, generator=r)[: len(lengths)]
    return slots, torch.tensor([0, *lengths]).cumsum(0), num_slots


def _draw(seed: int) -> tuple[torch.Generator, Callable[..., Tensor]]:
    r = torch.Generator().manual_seed(seed)
    # The numbers are exact in float32, so that only the arithmetic differs between float32 and float64.
    return r, lambda *shape: torch.randn(*shape, generator=r).double()


def attention_decode(seed: int, lengths: list[int], L: int, K: int, R: int, D: int) -> Case:
    """Draw a call in which the pages of a sequence are anywhere in the pool."""
    r, draw = _draw(seed)
    B, longest = len(lengths), max([1, *lengths])
    pages = -(-longest // L)
    table = torch.randperm(B * pages + 1, generator=r)[: B * pages].view(B, pages)
    held = torch.tensor([max(1, length) for length in lengths], dtype=torch.int64)
    args = [draw(B, K * R, D), draw(B * pages + 1, L, 2, K, D), table, held, longest]
    return Case(
        "attention.decode", {"lengths": lengths, "L": L, "K": K, "R": R, "D": D}, seed, args, dense={0: 2, 1: 3}
    )


def conv_prefill(seed: int, lengths: list[int], C: int, W: int, bias: bool) -> Case:
    r, draw = _draw(seed)
    slots, starts, J = _rows(r, lengths)
    args = [draw(sum(lengths), C), draw(C, W), draw(C) if bias else None, draw(J, W - 1, C), slots, starts]
    sizes = {"lengths": lengths, "C": C, "W": W, "bias": bias}
    return Case("causal_conv.prefill", sizes, seed, args, states=(3,), dense={1: 2, 3: 2})


def conv_update(seed: int, B: int, C: int, W: int, bias: bool) -> Case:
    r, draw = _draw(seed)
    slots, _, J = _rows(r, [1] * B)
    args = [draw(B, C), draw(C, W), draw(C) if bias else None, draw(J, W - 1, C), slots]
    return Case(
        "causal_conv.update",
        {"B": B, "C": C, "W": W, "bias": bias},
        seed,
        args,
        states=(3,),
        dense={1: 2, 3: 2},
    )


def gdn_prefill(seed: int, lengths: list[int], M: int, R: int, K: int, V: int, repeated: bool = False) -> Case:
    """Draw a call. repeated: all keys of a head are equal, so that only the rule's corrections keep the state small."""
    r, draw = _draw(seed)
    slots, starts, J = _rows(r, lengths)
    T, H = sum(lengths), M * R
    k = draw(1, M, K).expand(T, M, K).clone() if repeated else draw(T, M, K)
    g = -torch.rand(T, H, generator=r).double() * 10.0 ** torch.randint(-3, 2, (H,), generator=r)
    beta = torch.rand(T, H, generator=r).double()
    args = [draw(T, M, K), k, draw(T, H, V), g, beta, draw(J, H, K, V), slots, starts]
    sizes = {"lengths": lengths, "M": M, "R": R, "K": K, "V": V, "repeated": repeated}
    return Case("gated_delta_rule.prefill", sizes, seed, args, states=(5,), dense={5: 3}, wide=(3, 4, 5))


def gdn_decode(seed: int, B: int, M: int, R: int, K: int, V: int, W: int) -> Case:
    r, draw = _draw(seed)
    slots, _, J = _rows(r, [1] * B)
    H, C = M * R, 2 * M * K + M * R * V
    args = [
        draw(B, C),
        draw(B, H, V),
        draw(B, H),
        draw(B, H),
        draw(C, W),
        draw(H),
        draw(H) * 3,
        draw(V),
        draw(J, W - 1, C),
        draw(J, H, K, V),
        slots,
    ]
    sizes = {"B": B, "M": M, "R": R, "K": K, "V": V, "W": W}
    dense = {1: 2, 4: 2, 8: 2, 9: 3}
    options = {"num_key_heads": M, "eps": 1e-6}
    return Case("gated_delta_rule.decode", sizes, seed, args, options, (8, 9), dense, wide=(9,))


def ssd_prefill(seed: int, lengths: list[int], G: int, R: int, P: int, N: int) -> Case:
    r, draw = _draw(seed)
    slots, starts, J = _rows(r, lengths)
    T, H = sum(lengths), G * R
    dt = torch.rand(T, H, generator=r).double()
    A = -(10.0 ** torch.randint(-2, 2, (H,), generator=r).double())
    args = [draw(T, H, P), dt, A, draw(T, G, N), draw(T, G, N), draw(H), draw(J, H, P, N), slots, starts]
    sizes = {"lengths": lengths, "G": G, "R": R, "P": P, "N": N}
    return Case("ssd.prefill", sizes, seed, args, states=(6,), dense={6: 3}, wide=(1, 2, 6))


def ssd_decode(seed: int, B: int, G: int, R: int, P: int, N: int, W: int, bias: bool, norm: bool) -> Case:
    r, draw = _draw(seed)
    slots, _, J = _rows(r, [1] * B)
    H, I, C = G * R, G * R * P, G * R * P + 2 * G * N
    args = [
        draw(B, C),
        draw(B, I),
        draw(B, H),
        draw(C, W),
        draw(C) if bias else None,
        draw(H),
        draw(H),
        draw(H) * 3,
        draw(I) if norm else None,
        draw(J, W - 1, C),
        draw(J, H, P, N),
        slots,
    ]
    sizes = {"B": B, "G": G, "R": R, "P": P, "N": N, "W": W, "bias": bias, "norm": norm}
    limits = [(0.0, None), (0.001, 0.1)]
    options = {"num_groups": G, "dt_limit": limits[seed % 2], "eps": 1e-5}
    return Case("ssd.decode", sizes, seed, args, options, (9, 10), {3: 2, 9: 2, 10: 3}, wide=(10,))


def route(seed: int, N: int, E: int, K: int) -> Case:
    r, draw = _draw(seed)
    logits = torch.stack([torch.randperm(8 * E, generator=r)[:E] for _ in range(N)]) if N else draw(0, E)
    # no two logits are equal in bfloat16, if that is possible
    logits = logits.double() / 8 if 8 * E <= 256 else draw(N, E)
    return Case("moe.route", {"N": N, "E": E, "K": K}, seed, [logits, K])


def experts(seed: int, N: int, E: int, K: int, H: int, I: int) -> Case:
    """Draw a call in which some chosen experts are held by other ranks."""
    r, draw = _draw(seed)
    ids = torch.randint(-2, E + 2, (N, K), generator=r)
    weights = torch.rand(N, K, generator=r).double()
    args = [draw(N, H), weights, ids, draw(E, 2 * I, H) * H**-0.5, draw(E, H, I) * I**-0.5]
    sizes = {"N": N, "E": E, "K": K, "H": H, "I": I}
    return Case("moe.experts", sizes, seed, args, dense={3: 2, 4: 2}, wide=(1,))


def mixture(seed: int, N: int, E: int, K: int, H: int, I: int, S: int) -> Case:
    """Draw a call in which the sign of a row's first feature chooses the experts of the row.

    The router's scores differ so much that rounding cannot change the choice.
    """
    r, draw = _draw(seed)
    x, router = draw(N, H), 0.002 * draw(E, H)
    x[:, 0] = x[:, 0].sign() + (x[:, 0] == 0)
    router[:, 0] = torch.randperm(E, generator=r) / 2 - E / 4
    args = [x, router, draw(E, 2 * I, H) * H**-0.5, draw(E, H, I) * I**-0.5]
    args += [draw(S, H) * H**-0.5, draw(S, H) * H**-0.5, draw(H, S) * S**-0.5, draw(1, H) * H**-0.5]
    sizes = {"N": N, "E": E, "K": K, "H": H, "I": I, "S": S}
    return Case("moe.mixture", sizes, seed, args, {"top_k": K}, dense=dict.fromkeys(range(1, 8), 3))


def project(seed: int, N: int, H: int, O: list[int]) -> Case:
    _, draw = _draw(seed)
    weights = [draw(size, H) * H**-0.5 for size in O]
    return Case("linear.project", {"N": N, "H": H, "O": O}, seed, [draw(N, H), weights], dense={1: 2})


def rms_norm(seed: int, N: int, H: int) -> Case:
    _, draw = _draw(seed)
    return Case("norm.rms_norm", {"N": N, "H": H}, seed, [draw(N, H), draw(H), 1e-6])


def norm_then_gate(seed: int, N: int, H: int) -> Case:
    _, draw = _draw(seed)
    return Case("norm.norm_then_gate", {"N": N, "H": H}, seed, [draw(N, H), draw(N, H), draw(H), 1e-6])


def gate_then_norm(seed: int, N: int, G: int, H: int) -> Case:
    _, draw = _draw(seed)
    args = [draw(N, G * H), draw(N, G * H), draw(G * H), G, 1e-5]
    return Case("norm.gate_then_norm", {"N": N, "G": G, "H": H}, seed, args)


def rotate(seed: int, T: int, H: int, D: int, R: int) -> Case:
    _, draw = _draw(seed)
    angles = draw(T, R) * 10
    cos, sin = angles.cos().float().double(), angles.sin().float().double()
    return Case("rope.rotate", {"T": T, "H": H, "D": D, "R": R}, seed, [draw(T, H, D), cos, sin])


SMALL: list[Case] = [
    conv_prefill(1, [5, 0, 19, 1, 2], C=13, W=4, bias=True),
    conv_update(3, B=2, C=37, W=3, bias=False),
    gdn_prefill(5, [5, 0, 35], M=1, R=2, K=20, V=24),
    gdn_prefill(6, [33], M=1, R=1, K=16, V=40, repeated=True),
    gdn_decode(7, B=2, M=1, R=3, K=20, V=40, W=4),
    ssd_prefill(9, [5, 0, 35], G=1, R=2, P=36, N=24),
    ssd_decode(10, B=1, G=2, R=3, P=12, N=20, W=4, bias=True, norm=True),
    ssd_decode(11, B=1, G=1, R=1, P=16, N=16, W=2, bias=False, norm=False),
    route(12, N=3, E=24, K=3),
    experts(13, N=9, E=4, K=3, H=40, I=24),
    experts(14, N=1, E=9, K=2, H=16, I=16),
    experts(15, N=2, E=12, K=3, H=40, I=24),  # so few chosen experts that each is a tile of its own
    rms_norm(15, N=7, H=100),
    norm_then_gate(16, N=9, H=24),
    gate_then_norm(17, N=3, G=3, H=20),
    rotate(18, T=3, H=3, D=20, R=4),
]
"""A few calls of each op, quick enough for Triton's interpreter."""

WITHOUT_TRITON: list[Case] = [
    attention_decode(20, [3, 7], L=4, K=2, R=2, D=24),
    mixture(21, N=5, E=7, K=3, H=21, I=24, S=13),
    project(22, N=5, H=21, O=[24, 1, 32]),
]
"""The ops for which there is no Triton kernel."""

EMPTY: list[Case] = [
    conv_prefill(1, [0, 0], C=13, W=4, bias=True),
    conv_update(2, B=0, C=13, W=4, bias=True),
    gdn_prefill(3, [0], M=1, R=3, K=20, V=24),
    gdn_decode(4, B=0, M=2, R=3, K=20, V=40, W=4),
    ssd_prefill(5, [0, 0], G=1, R=3, P=20, N=24),
    ssd_decode(6, B=0, G=2, R=3, P=12, N=20, W=4, bias=True, norm=True),
    route(7, N=0, E=24, K=3),
    experts(8, N=0, E=5, K=3, H=40, I=24),
    rms_norm(9, N=0, H=100),
    norm_then_gate(10, N=0, H=24),
    gate_then_norm(11, N=0, G=3, H=20),
    rotate(12, T=0, H=3, D=20, R=4),
]
"""Calls without tokens: nothing may be launched, and nothing may change."""


if __name__ == "__main__":  # `python kernel_cases.py OP`: the small cases of an op on the GPU, for compute-sanitizer
    for small in SMALL:
        if small.op == sys.argv[1]:
            check(small, module_of(small, "triton"), torch.float32, "cuda")
            print(f"{small}: right")
