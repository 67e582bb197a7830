"""The experts of a mixture as a module that is compiled at its first use, in C++ for a CPU.

Under expert parallelism this stands for the MoE backend whose first use comes after the dispatch of the first layer.
`block_rows` is a choice that a server may tune: the results are the same.

Shapes: N rows, K picks of a row, H hidden, E experts held, I intermediate, J = 2 I (gate, then up).
"""

import ctypes
from pathlib import Path

import torch
from hybrid_moe_kernels.extension import Extension
from torch import Tensor

HERE = Path(__file__).parent
EXPERTS = Extension("moe_experts", (HERE / "jit_f32.cpp", HERE / "jit_f64.cpp"), (HERE / "jit.h",))

BLOCK_ROWS = (1, 4, 16)
"""Sensible choices of `block_rows`."""

DEVICES = ("cpu",)
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}
DTYPES = tuple(_SUFFIXES)


def experts(
    x_NH: Tensor, weights_NK: Tensor, ids_NK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor, block_rows: int = 4
) -> Tensor:
    """As the reference's: ids outside 0 to E - 1 are experts held elsewhere and contribute nothing.

    Raises ValueError for a `block_rows` that no function is made for.
    """
    dtype = gate_up_EJH.dtype
    x, weights = x_NH.to(dtype).contiguous(), weights_NK.to(dtype).contiguous()
    ids, gate_up, down = ids_NK.contiguous(), gate_up_EJH.contiguous(), down_EHI.contiguous()
    (N, K), (E, H, I) = ids.shape, down.shape
    out = torch.zeros(N, H, dtype=dtype)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weights, ids, gate_up, down, out)]
    run = getattr(EXPERTS.library(), f"moe_experts_{_SUFFIXES[dtype]}")
    if run(*map(ctypes.c_int64, (N, K, H, E, I, block_rows)), *pointers):
        raise ValueError(f"block_rows: {block_rows} is not one of 1, 2, 3, 4, 6, 8, 12, 16")
    return out.to(x_NH.dtype)
