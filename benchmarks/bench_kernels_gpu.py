"""Time the Triton kernels on a GPU, each beside a peer and beside a copy of the bytes that it must move.

    python benchmarks/bench_kernels_gpu.py [--only OP] [--tune] [--json FILE]

A row is timed only if its op is right against float64, on a small case of the same head sizes with new numbers. The
distance of its output from the peer's is recorded. A ratio that has a mark to reach says whether it did. Times are
medians over CUDA graphs of calls on buffers that take turns and together are larger than the L2 cache; what cannot be
captured is timed eagerly, and the row says so. First, a decode step of several layers is replayed as one graph.
`--tune` also tries the launch configurations that the kernels list. Without a CUDA device every
row says so, and the exit status is 0.

Not covered: powers and clocks are not set; the peers run with their own defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_rows import BF16, F32, ROWS, SEED, Row, comparison, peer_of
from gpu_timing import Call, copy_bandwidth, median_us, replayed_step
from machine import commit, mark, versions, write

MOST_COPIES = 1024
"""The most sets of inputs that take turns; a graph has a launch for each."""


def measure(row: Row, bandwidth: float, tune: bool) -> None:
    """Check the row's op, then time it and its peer, and put the figures into `row.result`."""
    module = importlib.import_module(f"hybrid_moe_kernels.{row.package}.triton")
    try:
        for dtype in (F32, BF16):
            if not (row.op == "moe.route" and dtype == BF16):  # equal logits come in any order
                comparison.check(row.gate, module, dtype, "cuda")
    except AssertionError as error:
        row.result["wrong"] = str(error).splitlines()[0]
        return
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    if row.op == "moe.experts":
        count = 4  # other inputs choose other experts
    else:
        count = max(1, min(MOST_COPIES, -(-3 * l2 // row.moved)))
        row.result["of_l2"] = count * row.moved / l2  # below 1, inputs stayed in the cache
    inputs = [row.make() for _ in range(count)]
    run = row.implementation("triton")
    row.result["triton_us"], row.result["how"] = median_us([lambda a=a, o=o: run(*a, **o) for a, o in inputs])
    row.result["floor_us"] = row.moved / bandwidth
    row.result["of_copy"] = row.result["floor_us"] / row.result["triton_us"]
    try:
        peer = peer_of(row)
        row.result["peer_us"], row.result["peer_how"] = median_us([lambda a=a, o=o: peer(*a, **o) for a, o in inputs])
        row.result["ratio"] = row.result["peer_us"] / row.result["triton_us"]
        args, options = row.make()
        again = [x.clone() if isinstance(x, torch.Tensor) and x.numel() < 2**30 else x for x in args]
        ours, theirs = run(*args, **options), peer(*again, **options)
        ours, theirs = (y[0] if isinstance(y, tuple) else y for y in (ours, theirs))
        row.result["from_peer"] = comparison.error(ours, theirs.double().cpu())
        if row.peer == "fla" and row.op.endswith("decode"):
            time_recurrence_alone(row, inputs)
    except Exception as error:  # the peer is not installed, or has another interface in this version
        row.result["peer_us"] = f"not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row.result["marks"] = {
        what: mark(row.result[what], wanted) for what, wanted in row.marks.items() if what in row.result
    }
    if tune:
        row.result["tried"] = tried = try_configs(row, module, inputs)
        print(f"    best of {len(tried)}: " + "; ".join(f"{us:.1f} us {config}" for us, config in tried[:3]))


def time_recurrence_alone(row: Row, inputs: list[Any]) -> None:
    """Time fla's recurrent kernel alone, on dense states that need no gathering from slots.

    No model serves like this, so it is not the peer of the whole step. It shows which part of the step's lead comes
    from the operations around the recurrence.
    """
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

    row.result["fla_recurrence_alone_us"] = median_us([call_of(args) for args, _ in inputs])[0]


def try_configs(row: Row, module: Any, inputs: list[Any]) -> list[tuple[float, Any]]:
    """Time each launch configuration that the kernel lists: (microseconds, configuration), fastest first."""
    from hybrid_moe_kernels.tile import forcing

    kernel = "norm" if row.package == "norm" else row.op
    run, tried = row.implementation("triton"), []
    for config in module.CONFIGS[kernel]:
        try:
            with forcing(kernel, config):
                tried.append((median_us([lambda a=a, o=o: run(*a, **o) for a, o in inputs], 0.15)[0], config))
        except Exception as error:  # too large for this device; each version of Triton raises another error
            tried.append((float("inf"), {**config, "error": str(error)[:80]}))
    return sorted(tried, key=lambda pair: pair[0])


def line(row: Row) -> str:
    name = f"{row.op:26}{', '.join(f'{size} {what}' for what, size in row.sizes.items()):40}"
    result = row.result
    for why in ("wrong", "failed", "not_run"):
        if why in result:
            return name + (result[why] if why == "not_run" else f"{why.upper()}: {result[why]}")
    peer = result["peer_us"]
    peer = peer if isinstance(peer, str) else f"{row.peer} {peer:9.1f} us  ratio {result['ratio']:.2f}"
    marks = "".join(f"  {what} {text}" for what, text in result["marks"].items())
    copy = f"{100 * result['of_copy']:3.0f} % of copy"
    return f"{name}{result['triton_us']:9.1f} us  {copy}  {peer}  ({result['how']}){marks}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="OP", help="only ops whose name begins with OP")
    parser.add_argument("--tune", action="store_true", help="also try the launch sizes that the kernels list")
    parser.add_argument("--json", type=Path, help="also write the rows there")
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
            row.result["not_run"] = lacking
        else:
            try:
                measure(row, bandwidth, args.tune)
            except Exception as error:  # the other rows still run
                row.result["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            with contextlib.suppress(RuntimeError):  # after a fault of the device every call fails
                torch.cuda.empty_cache()
        print(line(row), flush=True)
        document["rows"].append({"op": row.op, **row.sizes, "peer": row.peer, **row.result})
        if args.json:
            write(args.json, document)
    missed = [f"{row.op} {row.sizes}" for row in rows if "MISSED" in str(row.result.get("marks"))]
    if missed:
        print(f"MISSED: {'; '.join(missed)}")
    return 1 if any("wrong" in row.result or "failed" in row.result for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
