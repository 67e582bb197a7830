"""Compile every Triton kernel for an H200 (sm_90a) and report its resources. Needs no GPU, only the package triton.

    python benchmarks/kernel_registers.py [--json FILE] [--dtype bf16|f32]

The ops are called as in a model, on uninitialised tensors, but each launch only compiles. Launch code, sizes and
alignment are the real ones. Columns: registers per thread, bytes spilt (stores + loads), bytes of
shared memory, the tensor core instructions, and how many programs fit on a multiprocessor by registers, threads and
shared memory. Sizes: Gated DeltaNet of Qwen3.5-397B-A17B, Mamba-2 with 128 heads of 64 x 128 in 8 groups, experts of
4096 x 1024.

Exit status 1 if a kernel would not start: more than 227 KiB of shared memory.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import triton
except ModuleNotFoundError:
    print("kernel_registers: not run: the package triton is not installed")
    sys.exit(0)
if triton.knobs.runtime.interpret:
    sys.exit("kernel_registers: unset TRITON_INTERPRET, under which nothing is compiled")

import torch
from hybrid_moe_kernels.causal_conv import triton as causal_conv
from hybrid_moe_kernels.gated_delta_rule import triton as gated_delta_rule
from hybrid_moe_kernels.moe import triton as moe
from hybrid_moe_kernels.norm import triton as norm
from hybrid_moe_kernels.rope import triton as rope
from hybrid_moe_kernels.ssd import triton as ssd
from machine import commit, cpu, versions, write
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas  # Triton has several, and chooses one by the device
from triton.runtime.jit import JITFunction

SHARED_LIMIT = 227 * 1024  # bytes that one program can use
SHARED, REGISTERS, THREADS = 228 * 1024, 65536, 2048  # limits of a multiprocessor


class NoDevice:
    """A driver without a device, with the functions that Triton calls before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_only(record: Callable[[str, Any], None]) -> None:
    """Make every later launch compile its kernel and pass it to `record`, without launching it."""
    triton.runtime.driver.set_active(NoDevice())
    run = JITFunction.run

    @functools.wraps(run)
    def only_compile(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert all(size > 0 for size in grid), f"{self.__name__}: launched with the grid {grid}"
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        record(self.__name__, kernel)
        return kernel

    JITFunction.run = only_compile


def resources(kernel: Any) -> dict[str, Any]:
    """Return the resources of a compiled kernel, from the assembler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", f"{folder}/kernel.cubin", source]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", log)[0])
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", log)]
    shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
    granted = -(-registers // 8) * 8
    fitting = min(REGISTERS // (granted * threads), THREADS // threads, SHARED // (shared + 1024))
    return {
        "registers": registers,
        "spilt_bytes": sum(spills),
        "shared_bytes": shared,
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "tensor_cores": "wgmma"
        if "wgmma.mma_async" in kernel.asm["ptx"]
        else "mma"
        if "mma.sync" in kernel.asm["ptx"]
        else "",
        "programs_per_multiprocessor": fitting,
    }


def calls(dtype: torch.dtype) -> list[tuple[str, Callable[[], Any]]]:
    """Return the ops and the calls of them; no call reads a tensor."""

    def make(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=of)

    wide = torch.float32
    T, B, W = 512, 4, 4
    slots, starts = torch.arange(B), torch.tensor([0, 100, 100, 301, T])
    M, H, K, V = 16, 64, 128, 128
    C = 2 * M * K + H * V
    gdn_state = make(B, H, K, V, of=wide)
    N, P, G = 128, 64, 8
    I = 128 * P
    channels = I + 2 * G * N
    ssd_state = make(B, 128, P, N, of=wide)

    def gdn_decode(size: int) -> Any:
        inputs = (make(size, C), make(size, H, V), make(size, H), make(size, H), make(C, W), make(H), make(H), make(V))
        pools = (make(B, W - 1, C), gdn_state, torch.arange(size))
        return gated_delta_rule.decode(*inputs, *pools, num_key_heads=M, eps=1e-6)

    def experts(rows: int) -> Any:
        ids = torch.zeros(rows, 2, dtype=torch.int64)
        return moe.experts(make(rows, 4096), make(rows, 2, of=wide), ids, make(8, 2048, 4096), make(8, 4096, 1024))

    def gdn_prefill() -> Any:
        inputs = (make(T, M, K), make(T, M, K), make(T, H, V), make(T, H, of=wide), make(T, H, of=wide))
        return gated_delta_rule.prefill(*inputs, gdn_state, slots, starts)

    def ssd_prefill() -> Any:
        inputs = (make(T, 128, P), make(T, 128, of=wide), make(128, of=wide), make(T, G, N), make(T, G, N), make(128))
        return ssd.prefill(*inputs, ssd_state, slots, starts)

    def ssd_decode() -> Any:
        inputs = (make(B, channels), make(B, I), make(B, 128), make(channels, W), make(channels), make(128), make(128))
        pools = (make(B, W - 1, channels), ssd_state, slots)
        options: dict[str, Any] = {"num_groups": G, "dt_limit": (0.0, None), "eps": 1e-5}
        return ssd.decode(*inputs, make(128), make(I), *pools, **options)

    conv = (make(C, W), None, make(B, W - 1, C), slots)
    return [
        ("gated_delta_rule.prefill", gdn_prefill),
        ("gated_delta_rule.decode, 1 sequence", lambda: gdn_decode(1)),
        ("gated_delta_rule.decode, 128 sequences", lambda: gdn_decode(128)),
        ("ssd.prefill", ssd_prefill),
        ("ssd.decode", ssd_decode),
        ("causal_conv.prefill", lambda: causal_conv.prefill(make(T, C), *conv, starts)),
        ("causal_conv.update", lambda: causal_conv.update(make(B, C), *conv)),
        ("moe.route, 512 experts", lambda: moe.route(make(T, 512), 10)),
        ("moe.experts, 1 pick an expert", lambda: experts(4)),
        ("moe.experts, 32 picks", lambda: experts(128)),
        ("moe.experts, 128 picks", lambda: experts(512)),
        ("norm.rms_norm", lambda: norm.rms_norm(make(T, 4096), make(4096), 1e-6)),
        ("norm.rms_norm of heads", lambda: norm.rms_norm(make(T, 256), make(256), 1e-6)),
        ("norm.norm_then_gate", lambda: norm.norm_then_gate(make(T, V), make(T, V), make(V), 1e-6)),
        ("norm.gate_then_norm", lambda: norm.gate_then_norm(make(T, I), make(T, I), make(I), G, 1e-5)),
        ("rope.rotate", lambda: rope.rotate(make(T, 32, 256), make(T, 32), make(T, 32))),
    ]


def report(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row for each kernel that the ops launch. Afterwards this process cannot launch kernels."""
    compiled: list[tuple[str, Any]] = []
    compile_only(lambda name, kernel: compiled.append((name, kernel)))
    rows = []
    for op, call in calls(dtype):
        compiled.clear()
        call()
        for name, kernel in compiled:
            rows.append({"op": op, "kernel": name, "dtype": str(dtype).removeprefix("torch."), **resources(kernel)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    args = parser.parse_args()
    rows = report(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    document = {
        "hardware": f"compiled for sm_90a on {cpu()}; nothing ran",
        "versions": versions("triton") | {"ptxas": get_ptxas(90).version},
        "commit": commit(),
        "rows": rows,
    }
    print(f"{args.dtype}, sm_90a; " + ", ".join(f"{name} {version}" for name, version in document["versions"].items()))
    print(f"{'op':40}{'kernel':15}{'warps':>6}{'registers':>10}{'spilt':>7}{'shared':>9}{'programs':>9}  tensor cores")
    for row in rows:
        print(
            f"{row['op']:40}{row['kernel']:15}{row['num_warps']:6}{row['registers']:10}{row['spilt_bytes']:7}"
            f"{row['shared_bytes']:9}{row['programs_per_multiprocessor']:9}  {row['tensor_cores']}"
        )
    if args.json:
        write(args.json, document)
    too_large = [row["kernel"] for row in rows if row["shared_bytes"] > SHARED_LIMIT]
    if too_large:
        print(f"more than {SHARED_LIMIT} bytes of shared memory: {', '.join(too_large)}")
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
