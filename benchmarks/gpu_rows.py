"""The rows of bench_kernels_gpu.py: each op at sizes of Qwen3.5-397B-A17B or of Mamba-2, and its peer.

Shapes: T tokens, B sequences, N rows, H heads (or hidden), M key heads, K key dim, V value dim, C channels, P head dim,
G groups, E experts, I intermediate.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from machine import ROOT

sys.path.insert(0, str(ROOT / "tests" / "support"))  # for the cases that the tests check
import kernel_cases as cases
import kernel_comparison as comparison

BF16, F32 = torch.bfloat16, torch.float32
SEED = time.time_ns() % 10**6
"""Seed of the inputs that are checked: new in each run, and printed."""


@dataclass
class Row:
    """One op at one size, and what the benchmark measures of it.

    gate     the small case on which the op must be right before it is timed
    make     makes the inputs of a call on the GPU: (arguments, options)
    moved    bytes that a call must read or write
    peer     the backend or function to compare with
    marks    the least that the row should reach: "ratio" over the peer, "of_copy" of a copy's bandwidth
    """

    op: str
    sizes: dict[str, int]
    gate: comparison.Case
    make: Callable[[], tuple[list[Any], dict[str, Any]]]
    moved: int
    peer: str
    marks: dict[str, float] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def package(self) -> str:
        return self.op.partition(".")[0]

    def implementation(self, backend: str) -> Callable[..., Any]:
        module = importlib.import_module(f"hybrid_moe_kernels.{self.package}.{backend}")
        return getattr(module, self.op.rpartition(".")[2])


def draw(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype) * scale


def gdn_decode(B: int, H: int = 64, M: int = 16, K: int = 128, V: int = 128) -> Row:
    C = 2 * M * K + H * V

    def make() -> tuple[list[Any], dict[str, Any]]:
        inputs = [draw(B, C), draw(B, H, V), draw(B, H), draw(B, H), draw(C, 4, scale=0.5), draw(H), draw(H), draw(V)]
        pools = [draw(B, 3, C), draw(B, H, K, V, dtype=F32), torch.randperm(B, device="cuda")]
        return [*inputs, *pools], {"num_key_heads": M, "eps": 1e-6}

    moved = B * (2 * 4 * H * K * V + 2 * (C * 7 + 2 * H * V))
    marks = {"ratio": 2.0} if B <= 8 else {"of_copy": 0.85} if B >= 128 else {}
    gate = cases.gdn_decode(SEED, 3, 2, H // M, K, V, 4)
    return Row("gated_delta_rule.decode", {"sequences": B, "heads": H}, gate, make, moved, "fla", marks)


def gdn_prefill(T: int, B: int = 1, H: int = 64, M: int = 16, K: int = 128, V: int = 128) -> Row:
    def make() -> tuple[list[Any], dict[str, Any]]:
        g, beta = -torch.rand(T, H, device="cuda") * 0.1, torch.rand(T, H, device="cuda")
        starts = torch.arange(0, T + 1, T // B, device="cuda")
        state = draw(B, H, K, V, dtype=F32)
        slots = torch.arange(B, device="cuda")
        return [draw(T, M, K), draw(T, M, K), draw(T, H, V), g, beta, state, slots, starts], {}

    moved = T * (2 * (2 * M * K + 2 * H * V) + 8 * H) + 8 * B * H * K * V
    gate = cases.gdn_prefill(SEED, [1, 64, 200], 2, H // M, K, V)
    marks = {"ratio": 1.2} if T == 8192 and B == 1 else {}
    return Row("gated_delta_rule.prefill", {"tokens": T, "sequences": B, "heads": H}, gate, make, moved, "fla", marks)


def ssd_decode(B: int, H: int = 128, P: int = 64, N: int = 128, G: int = 8) -> Row:
    I, C = H * P, H * P + 2 * G * N

    def make() -> tuple[list[Any], dict[str, Any]]:
        inputs = [draw(B, C), draw(B, I), draw(B, H), draw(C, 4, scale=0.5), draw(C), draw(H), draw(H), draw(H)]
        pools = [draw(I), draw(B, 3, C), draw(B, H, P, N, dtype=F32), torch.randperm(B, device="cuda")]
        return [*inputs, *pools], {"num_groups": G, "dt_limit": (0.0, None), "eps": 1e-5}

    moved = B * (2 * 4 * H * P * N + 2 * (C * 7 + 2 * I))
    gate = cases.ssd_decode(SEED, 3, 2, H // G, P, N, 4, bias=True, norm=True)
    return Row("ssd.decode", {"sequences": B, "heads": H}, gate, make, moved, "mamba_ssm", {"ratio": 1.3})


def ssd_prefill(T: int, B: int = 1, H: int = 128, P: int = 64, N: int = 128, G: int = 8) -> Row:
    def make() -> tuple[list[Any], dict[str, Any]]:
        dt, A = torch.rand(T, H, device="cuda") * 0.1, -torch.rand(H, device="cuda") * 8
        starts = torch.arange(0, T + 1, T // B, device="cuda")
        state, slots = draw(B, H, P, N, dtype=F32), torch.arange(B, device="cuda")
        return [draw(T, H, P), dt, A, draw(T, G, N), draw(T, G, N), draw(H), state, slots, starts], {}

    moved = T * (4 * H * P + 4 * G * N + 4 * H) + 8 * B * H * P * N
    gate = cases.ssd_prefill(SEED, [1, 64, 200], 2, 3, P, N)
    return Row("ssd.prefill", {"tokens": T, "sequences": B, "heads": H}, gate, make, moved, "mamba_ssm")


def conv_prefill(T: int, C: int = 12288) -> Row:
    def make() -> tuple[list[Any], dict[str, Any]]:
        starts = torch.tensor([0, T], device="cuda")
        slots = torch.zeros(1, dtype=torch.int64, device="cuda")
        return [draw(T, C), draw(C, 4), None, draw(1, 3, C), slots, starts], {}

    gate = cases.conv_prefill(SEED, [1, 64, 0, 200], 300, 4, False)
    return Row("causal_conv.prefill", {"tokens": T, "channels": C}, gate, make, 4 * T * C, "reference")


def conv_update(B: int, C: int = 12288) -> Row:
    def make() -> tuple[list[Any], dict[str, Any]]:
        return [draw(B, C), draw(C, 4), None, draw(B, 3, C), torch.randperm(B, device="cuda")], {}

    gate = cases.conv_update(SEED, 3, 300, 4, False)
    return Row("causal_conv.update", {"sequences": B, "channels": C}, gate, make, 2 * B * C * 8, "reference")


@functools.cache
def expert_weights(E: int, H: int, I: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(E, 2 * I, H, scale=H**-0.5), draw(E, H, I, scale=I**-0.5)


def experts(N: int, E: int = 512, K: int = 10, H: int = 4096, I: int = 1024) -> Row:
    """Make a row of `moe.experts`. All calls and rows share the weights of one layer: 12.9 GB, more than any cache."""

    def make() -> tuple[list[Any], dict[str, Any]]:
        weights = expert_weights(E, H, I)
        ids = torch.rand(N, E, device="cuda").topk(K).indices
        return [draw(N, H), torch.softmax(draw(N, K, dtype=F32), -1), ids, *weights], {}

    hit = E * (1 - (1 - K / E) ** N)
    moved = int(hit * 6 * H * I + N * (4 * H + K * (2 * H + 2 * I) * 2))
    marks = {"ratio": 1.0} | ({"of_copy": 0.8} if N < 128 else {})
    gate = cases.experts(SEED, 40, 16, 4, 256, 128)
    return Row("moe.experts", {"rows": N, "experts": E, "picks": K}, gate, make, moved, "torch._grouped_mm", marks)


def route(N: int, E: int = 512, K: int = 10) -> Row:
    gate = cases.route(SEED, 50, 32, K)
    return Row("moe.route", {"rows": N}, gate, lambda: ([draw(N, E), K], {}), N * (2 * E + 12 * K), "reference")


def rms_norm(N: int, H: int = 4096) -> Row:
    gate = cases.rms_norm(SEED, 50, H)
    return Row("norm.rms_norm", {"rows": N}, gate, lambda: ([draw(N, H), draw(H), 1e-6], {}), 4 * N * H, "reference")


def rotate(T: int, H: int = 32, D: int = 256, R: int = 32) -> Row:
    gate = cases.rotate(SEED, 50, H, D, R)
    return Row(
        "rope.rotate",
        {"tokens": T},
        gate,
        lambda: ([draw(T, H, D), draw(T, R), draw(T, R)], {}),
        4 * T * H * D,
        "reference",
    )


ROWS = [
    *(gdn_decode(B) for B in (1, 2, 4, 8, 32, 128, 256)),
    *(ssd_decode(B) for B in (1, 8, 64, 256)),
    *(ssd_prefill(T) for T in (512, 8192)),
    conv_prefill(8192),
    *(conv_update(B) for B in (1, 128)),
    *(experts(N) for N in (1, 4, 16, 64, 128, 512, 1024, 4096)),
    *(route(N) for N in (1, 128, 4096)),
    *(rms_norm(N) for N in (1, 128, 8192)),
    *(rotate(T) for T in (1, 128, 8192)),
    # These come last, the longest first: with Triton 3.6, fla's kernels can end the process by an illegal access.
    gdn_prefill(8192),
    gdn_prefill(8192, 8),
    *(gdn_prefill(T) for T in (2048, 512)),
]


def grouped_mm_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Compute `moe.experts` with torch's grouped product, for ids 0 to E - 1. No step waits for the device."""
    (N, K), E = ids.shape, gate_up.shape[0]
    sorted_ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(E, device=ids.device), right=True).int()
    gate, up = torch._grouped_mm(x[order // K], gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    placed = torch.empty_like(out)
    placed[order] = out
    return (placed.unflatten(0, (N, K)).float() * weights[..., None]).sum(1).to(x.dtype)


def peer_of(row: Row) -> Callable[..., Any]:
    """Return the function to compare with. Raises ImportError if its package is not installed."""
    return grouped_mm_experts if row.peer == "torch._grouped_mm" else row.implementation(row.peer)
