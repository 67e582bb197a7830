"""The gated delta rule of a prefill as an extension that is compiled at its first use: C++ on a CPU, CUDA on a GPU.

Serving libraries compile one function for each pair of head sizes when it is first needed. This extension shows what
that does to the start of a server. It is not fast.

Shapes: T tokens of all sequences, M key heads, H value heads, K key dim, V value dim, B sequences, X = B + 1 bounds
(sequence b is between bounds b and b + 1), J slots (each holds the state of one sequence).
"""

import ctypes
from pathlib import Path

import torch
from hybrid_moe_kernels.extension import Extension
from torch import Tensor

HERE = Path(__file__).parent
PREFILL = Extension("gdn_prefill", (HERE / "gdn_prefill.cpp",), (HERE / "gdn_prefill.h",), ("-O3", "-funroll-loops"))
PREFILL_CUDA = Extension("gdn_prefill_cuda", (HERE / "gdn_prefill.cu",))

# return code of gdn_prefill.cu if the GPU refuses the launch; 1 means that there is no function for these sizes
LAUNCH_FAILED = 2
_SUFFIXES = {torch.float32: "f32", torch.float64: "f64"}


def extension(device: torch.device) -> Extension:
    """Return the extension that `prefill` uses on this device."""
    return PREFILL_CUDA if device.type == "cuda" else PREFILL


def prefill(
    q_TMK: Tensor,
    k_TMK: Tensor,
    v_THV: Tensor,
    g_TH: Tensor,
    beta_TH: Tensor,
    state_JHKV: Tensor,
    slots_B: Tensor,
    cu_seqlens_X: Tensor,
) -> Tensor:
    """Process all tokens of several sequences. Return o [T, H, V], as `gated_delta_rule.reference.prefill` does.

    Sequence b starts from state[slots[b]] and stores its last state there.

    Raises ValueError for head sizes that have no function, RuntimeError if the GPU refuses the launch.
    """
    wide = state_JHKV.dtype
    q, k, v, g, beta = (x.to(wide) for x in (q_TMK, k_TMK, v_THV, g_TH, beta_TH))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k, v, g, beta = (x.contiguous() for x in (q * q.shape[-1] ** -0.5, k, v, g, beta))
    starts, slots = (x.to(v.device, torch.int64).contiguous() for x in (cu_seqlens_X, slots_B))
    (_, M, K), (_, H, V) = q.shape, v.shape
    o = torch.empty_like(v)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (starts, slots, q, k, v, g, beta, o, state_JHKV)]
    if v.is_cuda:
        pointers.append(ctypes.c_void_p(torch.cuda.current_stream(v.device).cuda_stream))
    module = extension(v.device)
    run = getattr(module.library(), f"{module.name}_{_SUFFIXES[wide]}")
    failed = run(*map(ctypes.c_int64, (slots.numel(), M, H, K, V, state_JHKV.stride(0))), *pointers)
    if failed == LAUNCH_FAILED:
        raise RuntimeError(f"{module.name}: the device refused the launch for heads of K = {K}, V = {V}")
    if failed:
        raise ValueError(f"{module.name}: there is no function for heads of K = {K}, V = {V}")
    return o.to(v_THV.dtype)
