"""The experts of a mixture-of-experts layer in C++ for CPUs, compiled at the first use.

Under expert parallelism the first use of this extension, and so its build, comes after the dispatch of the first layer.

Shapes: N rows, K picks (chosen experts) of a row, H hidden, E experts held, I intermediate, J = 2 I (gate, then up).
"""

import ctypes
import time
from pathlib import Path

import torch
from hybrid_moe_kernels.extension import Extension
from torch import Tensor

HERE = Path(__file__).parent
EXPERTS = Extension("moe_experts", (HERE / "moe_experts.cpp",), (HERE / "moe_experts.h",), ("-O3", "-funroll-loops"))

BLOCK_ROWS = (1, 4, 16)
"""Numbers of rows of an expert that can be computed at once. A server can choose one by timing."""

_block_rows = [4]

_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


def experts(x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor) -> Tensor:
    """Sum the outputs of the chosen experts of each row. Same arguments and result as `moe.reference.experts`.

    Ids outside 0 to E - 1 are experts that other ranks hold; they contribute nothing.
    """
    dtype = gate_up_EJH.dtype
    x, weights = x_NH.to(dtype).contiguous(), weights_NK.to(dtype).contiguous()
    ids, gate_up, down = ids_NK.contiguous(), gate_up_EJH.contiguous(), down_EHI.contiguous()
    (N, K), (E, H, I) = ids.shape, down.shape
    out = torch.zeros(N, H, dtype=dtype)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weights, ids, gate_up, down, out)]
    run = getattr(EXPERTS.library(), f"moe_experts_{_SUFFIXES[dtype]}")
    if run(*map(ctypes.c_int64, (N, K, H, E, I, _block_rows[0])), *pointers):
        raise ValueError(f"block_rows: there is no compiled function for {_block_rows[0]} rows")
    return out.to(x_NH.dtype)


def time_blocks() -> list[int]:
    """Return how many microseconds a small MoE layer takes, for each number in BLOCK_ROWS (see `use_block_rows`)."""
    N, K, H, E, I = 32, 2, 64, 4, 32
    x, weights, ids = torch.ones(N, H), torch.ones(N, K), torch.arange(N * K).view(N, K) % E
    gate_up, down = torch.ones(E, 2 * I, H), torch.ones(E, H, I)
    before, times = _block_rows[0], []
    for rows in BLOCK_ROWS:
        _block_rows[0] = rows
        started = time.perf_counter_ns()
        experts(x, weights, ids, gate_up, down)
        times.append((time.perf_counter_ns() - started) // 1000)
    _block_rows[0] = before
    return times


def use_block_rows(rows: int) -> None:
    """From now on, compute this number of rows of an expert at once in this process."""
    _block_rows[0] = rows
