"""The Triton kernels on a GPU, each beside a peer in the same run and beside a copy of the bytes that it must move.

    python benchmarks/bench_kernels_gpu.py [--only OP] [--tune] [--json FILE]

A row is timed only if its op is right first, against float64, on a small case of the same head sizes and fresh
numbers; and its output is compared with the peer's. Beside a ratio that has a mark to pass stands whether it did. Times
are medians over CUDA graphs of calls on buffers that take turns and together are larger than the L2 cache; what cannot
be captured is timed as it is, and says so. First of all, a decode step of several layers is replayed as one graph.
`--tune` also tries the launch sizes that the kernels list, and prints the best. Without a CUDA device every row says
so, and the exit status is 0.

What is not covered: powers and clocks are as found; the peers run with their own defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import ROOT, commit, mark, versions, write

sys.path.insert(0, str(ROOT / "tests" / "support"))  # for the cases that the tests check
import kernel_cases as cases

Call = Callable[[], Any]
MOST_COPIES = 1024  # of inputs that take turns; a graph holds a launch for each
BF16, F32 = torch.bfloat16, torch.float32
SEED = time.time_ns() % 10**6
"""Of the inputs that are checked; printed, and new each time."""


@dataclass
class Row:
    """One op at one size. `make` gives a call's inputs on the device; `moved` are the bytes that it cannot avoid."""

    op: str
    sizes: dict[str, int]
    gate: cases.Case
    make: Callable[[], tuple[list[Any], dict[str, Any]]]
    moved: int
    peer: str
    marks: dict[str, float] = field(default_factory=dict)  # at least: "ratio" over the peer, "of_copy" of its bandwidth
    found: dict[str, Any] = field(default_factory=dict)

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
    """One layer's weights, 12.9 GB of them, are larger than any cache: calls and rows share them."""

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
    # Last, the longest first: with Triton 3.6 fla's kernels can end in an illegal access, and the process with them.
    gdn_prefill(8192),
    gdn_prefill(8192, 8),
    *(gdn_prefill(T) for T in (2048, 512)),
]


def grouped_mm_experts(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The same with torch's grouped product; all experts are held. No step waits for the device."""
    (N, K), E = ids.shape, gate_up.shape[0]
    sorted_ids, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(E, device=ids.device), right=True).int()
    gate, up = torch._grouped_mm(x[order // K], gate_up.mT, offs=ends).chunk(2, dim=-1)
    out = torch._grouped_mm(F.silu(gate) * up, down.mT, offs=ends)
    placed = torch.empty_like(out)
    placed[order] = out
    return (placed.unflatten(0, (N, K)).float() * weights[..., None]).sum(1).to(x.dtype)


def peer_of(row: Row) -> Callable[..., Any]:
    """Raises ImportError where the peer is not installed."""
    return grouped_mm_experts if row.peer == "torch._grouped_mm" else row.implementation(row.peer)


def replayed_step(B: int = 8, layers: int = 4, hidden: int = 4096) -> dict[str, Any]:
    """Microseconds of a decode step of Gated DeltaNet and experts, from norm to norm, in one graph and call by call."""
    from hybrid_moe_kernels.gated_delta_rule import triton as gated_delta_rule
    from hybrid_moe_kernels.moe import triton as moe
    from hybrid_moe_kernels.norm import triton as norm

    H, M, K, E = 64, 16, 128, 512
    C = 2 * M * K + H * K
    sizes = [C, H * K, H, H]
    weights = expert_weights(E, hidden, 1024)
    stack = []
    for _ in range(layers):
        project, back, router = draw(sum(sizes), hidden, scale=hidden**-0.5), draw(hidden, H * K), draw(E, hidden)
        gates = [draw(C, 4, scale=0.5), draw(H), draw(H), draw(K)]
        pools = [draw(B, 3, C), draw(B, H, K, K, dtype=F32)]
        stack.append((draw(hidden), project, gates, pools, back, draw(hidden), router))
    x_NH, slots = draw(B, hidden), torch.randperm(B, device="cuda")

    def step() -> torch.Tensor:
        x = x_NH
        for first, project, gates, pools, back, second, router in stack:
            qkv, z, b, a = F.linear(norm.rms_norm(x, first, 1e-6), project).split(sizes, -1)
            z = z.unflatten(-1, (H, K))
            y = gated_delta_rule.decode(qkv, z, b, a, *gates, *pools, slots, num_key_heads=M, eps=1e-6)
            x = x + F.linear(y.flatten(-2), back) * hidden**-0.5
            normed = norm.rms_norm(x, second, 1e-6)
            chosen = moe.route(F.linear(normed, router), 10)
            x = x + moe.experts(normed, *chosen, *weights)
        return x

    in_graph, how = median_us([step])
    one_by_one, _ = median_us([step], capture=False)
    return {"layers": layers, "sequences": B, f"{how}_us": in_graph, "one_by_one_us": one_by_one}


def median_us(calls: list[Call], budget_s: float = 0.4, capture: bool = True) -> tuple[float, str]:
    """Microseconds of one call, and how it was timed; the calls take turns."""
    for call in calls:
        call()  # compiles, and settles the allocator
    torch.cuda.synchronize()
    how, once = "graph", None
    try:
        if not capture:
            raise RuntimeError("not to be captured")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        once = graph.replay
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize()
        how = "eager"

        def once() -> None:
            for call in calls:
                call()

    times: list[float] = []
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(200):
        start.record()
        once()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(start.elapsed_time(end) / len(calls) * 1e3)
        if len(times) >= 7 and sum(times) * len(calls) > budget_s * 1e6:
            break
    return statistics.median(times), how


def copy_bandwidth() -> float:
    """Bytes per microsecond of a copy, read and written."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not in a graph, which copies by other means: on an H200 with 2.7 TB/s, less than kernels here move.
    return 2 * source.numel() / median_us([lambda: target.copy_(source)], capture=False)[0]


def measure(row: Row, bandwidth: float, tune: bool) -> None:
    """Fill in what was found."""
    module = importlib.import_module(f"hybrid_moe_kernels.{row.package}.triton")
    try:
        for dtype in (F32, BF16):
            if not (row.op == "moe.route" and dtype == BF16):  # equal logits come in any order
                cases.check(row.gate, module, dtype, "cuda")
    except AssertionError as error:
        row.found["wrong"] = str(error).splitlines()[0]
        return
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    if row.op == "moe.experts":
        count = 4  # other rows hit other experts
    else:
        count = max(1, min(MOST_COPIES, -(-3 * l2 // row.moved)))
        row.found["of_l2"] = count * row.moved / l2  # below 1, inputs stayed in the cache
    inputs = [row.make() for _ in range(count)]
    run = row.implementation("triton")
    row.found["triton_us"], row.found["how"] = median_us([lambda a=a, o=o: run(*a, **o) for a, o in inputs])
    row.found["floor_us"] = row.moved / bandwidth
    row.found["of_copy"] = row.found["floor_us"] / row.found["triton_us"]
    try:
        peer = peer_of(row)
        row.found["peer_us"], row.found["peer_how"] = median_us([lambda a=a, o=o: peer(*a, **o) for a, o in inputs])
        row.found["ratio"] = row.found["peer_us"] / row.found["triton_us"]
        args, options = row.make()
        again = [x.clone() if isinstance(x, torch.Tensor) and x.numel() < 2**30 else x for x in args]
        ours, theirs = run(*args, **options), peer(*again, **options)
        ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs))
        row.found["from_peer"] = cases.error(ours, theirs.double().cpu())
        if row.peer == "fla" and row.op.endswith("decode"):
            times_on_states_of_its_own(row, inputs)
    except Exception as error:  # a peer that is not there, or that this version of it cannot be called so
        row.found["peer_us"] = f"not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row.found["marks"] = {
        what: mark(row.found[what], wanted) for what, wanted in row.marks.items() if what in row.found
    }
    if tune:
        row.found["tried"] = tried = try_configs(row, module, inputs)
        print(f"    best of {len(tried)}: " + "; ".join(f"{us:.1f} us {config}" for us, config in tried[:3]))


def times_on_states_of_its_own(row: Row, inputs: list[Any]) -> None:
    """fla's recurrent kernel alone, on dense states that it need not gather from slots and put back: no model serves
    like this, so it is no peer of the whole step, but it shows what of the step's lead is the chain around it."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    M = inputs[0][1]["num_key_heads"]

    def call_of(args: list[Any]) -> Call:
        (B, H, V), K = args[1].shape, args[9].shape[2]
        q, k, v = args[0].split([M * K, M * K, H * V], -1)
        q, k, v = q.reshape(B, 1, M, K), k.reshape(B, 1, M, K), v.reshape(B, 1, H, V)
        b, a = args[2][:, None], args[3][:, None]
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True}
        options |= {"A_log": args[5], "dt_bias": args[6], "use_beta_sigmoid_in_kernel": True}
        return lambda: fused_recurrent_gated_delta_rule(q, k, v, g=a, beta=b, initial_state=args[9], **options)

    row.found["fla_recurrence_alone_us"] = median_us([call_of(args) for args, _ in inputs])[0]


def try_configs(row: Row, module: Any, inputs: list[Any]) -> list[tuple[float, Any]]:
    """Microseconds and launch sizes, best first."""
    from hybrid_moe_kernels.tile import forcing

    kernel = "norm" if row.package == "norm" else row.op
    run, tried = row.implementation("triton"), []
    for config in module.CONFIGS[kernel]:
        try:
            with forcing(kernel, config):
                tried.append((median_us([lambda a=a, o=o: run(*a, **o) for a, o in inputs], 0.15)[0], config))
        except Exception as error:  # does not fit on this device: each version of Triton has its own error
            tried.append((float("inf"), {**config, "error": str(error)[:80]}))
    return sorted(tried, key=lambda pair: pair[0])


def line(row: Row) -> str:
    name = f"{row.op:26}{', '.join(f'{size} {what}' for what, size in row.sizes.items()):40}"
    found = row.found
    for why in ("wrong", "failed", "not_run"):
        if why in found:
            return name + (found[why] if why == "not_run" else f"{why.upper()}: {found[why]}")
    peer = found["peer_us"]
    peer = peer if isinstance(peer, str) else f"{row.peer} {peer:9.1f} us  ratio {found['ratio']:.2f}"
    marks = "".join(f"  {what} {told}" for what, told in found["marks"].items())
    copy = f"{100 * found['of_copy']:3.0f} % of copy"
    return f"{name}{found['triton_us']:9.1f} us  {copy}  {peer}  ({found['how']}){marks}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="OP", help="ops whose name begins so")
    parser.add_argument("--tune", action="store_true", help="also try the launch sizes that the kernels list")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    rows = [row for row in ROWS if row.op.startswith(args.only)]
    if not rows:
        parser.error(f"no op begins with {args.only!r}; there are {', '.join(sorted({row.op for row in ROWS}))}")
    lacking = "" if torch.cuda.is_available() else "not run: no CUDA device"
    if not lacking and importlib.util.find_spec("triton") is None:
        lacking = "not run: triton is not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    document: dict[str, Any] = {
        "hardware": device,
        "versions": versions("triton", "fla", "mamba_ssm"),
        "commit": commit(),
        "seed": SEED,
        "rows": [],
    }
    print(f"{device}, {document['versions']}, commit {document['commit'][:9]}, seed {SEED}")
    bandwidth = 0.0
    if not lacking:
        torch.manual_seed(SEED)
        bandwidth = document["copy_bytes_per_us"] = copy_bandwidth()
        print(f"copy {bandwidth / 1e6:.2f} TB/s")
        if not args.only:
            document["step"] = replayed_step()
            print(f"a decode step of several layers: {document['step']}")
    for row in rows:
        if lacking:
            row.found["not_run"] = lacking
        else:
            try:
                measure(row, bandwidth, args.tune)
            except Exception as error:  # the other rows are worth having
                row.found["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with contextlib.suppress(RuntimeError):  # after a fault of the device nothing works
                torch.cuda.empty_cache()
        print(line(row), flush=True)
        document["rows"].append({"op": row.op, **row.sizes, "peer": row.peer, **row.found})
        if args.json:
            write(args.json, document)
    missed = [f"{row.op} {row.sizes}" for row in rows if "MISSED" in str(row.found.get("marks"))]
    if missed:
        print(f"MISSED: {'; '.join(missed)}")
    return 1 if any("wrong" in row.found or "failed" in row.found for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
