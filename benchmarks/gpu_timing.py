"""Time calls on a GPU: by CUDA graphs where they can be captured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_rows import F32, draw, expert_weights

Call = Callable[[], Any]


def median_us(calls: list[Call], budget_s: float = 0.4, capture: bool = True) -> tuple[float, str]:
    """Return the median microseconds of one call, and "graph" or "eager" for how it was timed.

    calls      calls of one function on different inputs; they take turns
    budget_s   about how long to measure
    capture    replay a CUDA graph of the calls; calls that cannot be captured are timed eagerly
    """
    for call in calls:
        call()  # compiles, and settles the allocator
    torch.cuda.synchronize()
    how, once = "graph", None
    try:
        if not capture:
            raise RuntimeError("capture is off")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        once = graph.replay
    except RuntimeError:  # a call waits for the device
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
    """Return the bytes per microsecond that a copy reads and writes."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Not as a graph, whose copy is slower than these kernels: 2.7 TB/s on an H200.
    return 2 * source.numel() / median_us([lambda: target.copy_(source)], capture=False)[0]


def replayed_step(B: int = 8, layers: int = 4, hidden: int = 4096) -> dict[str, Any]:
    """Time a decode step of Gated DeltaNet and experts, from norm to norm, as one graph and call by call.

    Returns microseconds as "graph_us" and "one_by_one_us".
    """
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
