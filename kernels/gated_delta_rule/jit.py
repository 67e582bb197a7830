"""The gated delta rule of a prefill as a module that is compiled at its first use: C++ on a CPU, CUDA on a GPU.

What serving libraries do: a function for each pair of head sizes, compiled where it is needed. It is here for what
this does to the start of a server, not for speed.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

import ctypes
from pathlib import Path

import torch
from hybrid_moe_kernels.extension import Extension
from torch import Tensor

HERE = Path(__file__).parent
PREFILL = Extension("gdn_prefill", (HERE / "jit_f32.cpp", HERE / "jit_f64.cpp"), (HERE / "jit.h",))
PREFILL_CUDA = Extension("gdn_prefill_cuda", (HERE / "jit.cu",))  # not yet run on a GPU

_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


def extension(device: torch.device) -> Extension:
    """What `chunk_gated_delta_rule` uses on this device."""
    return PREFILL_CUDA if device.type == "cuda" else PREFILL


def chunk_gated_delta_rule(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g_BTH: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the reference's: o [B, T, H, V] of v's dtype, and the final state in float32 or float64.

    Raises ValueError for head sizes that no function is made for.
    """
    wide = torch.promote_types(v_BTHV.dtype, torch.float32)
    q, k, v, g, beta = (x.to(wide).contiguous() for x in (q_BTHK, k_BTHK, v_BTHV, g_BTH, beta_BTH))
    B, T, H, V = v.shape
    K = k.shape[-1]
    # A copy: the caller's state is not to change.
    state = v.new_zeros(B, H, K, V) if state_BHKV is None else state_BHKV.to(wide, copy=True).contiguous()
    o = torch.empty_like(v)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, g, beta, o, state)]
    name = f"{extension(v.device).name}_{_SUFFIXES[wide]}"
    if v.is_cuda:
        pointers.append(ctypes.c_void_p(torch.cuda.current_stream(v.device).cuda_stream))
    run = getattr(extension(v.device).library(), name)
    if run(*map(ctypes.c_int64, (B, T, H, K, V)), *pointers):
        raise ValueError(f"{name} was not made for heads of key dim {K} and value dim {V}")
    return o.to(v_BTHV.dtype), state
