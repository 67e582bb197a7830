"""Time the C++ kernels on this CPU, op by op, beside the torch reference and peers, in one process.

    python benchmarks/bench_kernels.py [--only OP] [--budget 0.05] [--strict] [--json FILE]

A row is an op at one size and dtype. It is timed only if the native result is right on the same inputs: float32 within
5e-6 of float64, and bfloat16 at most 1.2 times as far from float64 as the torch reference in bfloat16. (The rows of
`moe` are checked on fewer experts, and on inputs whose choice of experts rounding does not change.) The implementations
take turns, and the fastest call of each counts. `floor` is the time that a copy of the bytes which a call must touch
takes. Sizes are those of a layer of the preset `race`; "wide" rows have heads of 128.

Exit status 1 if a result is wrong; with `--strict` also if torch or the peer is faster than native.

Not covered: small inputs stay in the caches between calls of all implementations, so a row can be faster than its
floor, which is the bandwidth of memory.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hybrid_moe_kernels import native
from machine import ROOT, commit, copy_bandwidth, cpu, product_rate, versions, write
from torch import Tensor

sys.path.insert(0, str(ROOT / "tests" / "support"))  # for the cases that the tests check
import cpu_peers
import kernel_cases as cases
import kernel_comparison as comparison

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 4  # in which the implementations alternate, so that a busy machine slows all


@dataclass
class Row:
    """One op at one size.

    series    the model whose sizes the row has: "race" or "wide"
    size      the size that grows along a series: tokens, sequences or rows
    work      multiplications and additions of a call
    gate      the case on which the op must be right before it is timed; None: the row's own
    held      indices of arguments that are stacked experts, of which a call reads only the chosen ones
    """

    op: str
    series: str
    size: int
    case: comparison.Case
    work: float
    gate: comparison.Case | None = None
    held: tuple[int, ...] = ()
    result: dict[str, Any] = field(default_factory=dict)


def rows(only: str = "") -> Iterator[Row]:
    """Make the rows of the ops whose name begins with `only`.

    race: 4 key heads and 8 value heads of 64, hidden 256, 512 experts of 64, 10 per token. wide: heads of 128.
    """
    for packages, make in (
        (("gated_delta_rule", "ssd", "causal_conv"), recurrent_rows),
        (("moe",), expert_rows),  # made only when needed: 200 MB of weights in float64
        (("norm", "rope", "linear"), small_rows),
    ):
        if any(package.startswith(only.partition(".")[0]) for package in packages):
            yield from (row for row in make() if row.op.startswith(only))


def recurrent_rows() -> Iterator[Row]:
    for series, M, R, K in (("race", 4, 2, 64), ("wide", 8, 2, 128)):
        H, C = M * R, 2 * M * K + M * R * K
        for T in (1, 16, 64, 512, 2048) if series == "race" else (512,):
            case = cases.gdn_prefill(T, [T], M, R, K, K)
            yield Row("gated_delta_rule.prefill", series, T, case, 7 * T * H * K * K)
        for B in (1, 2, 8, 32) if series == "race" else (1, 8):
            case = cases.gdn_decode(B, B, M, R, K, K, 4)
            yield Row("gated_delta_rule.decode", series, B, case, B * (7 * H * K * K + 8 * C))
    for series, G, R, P, N in (("race", 1, 8, 64, 64), ("wide", 8, 4, 64, 128)):
        H = G * R
        for T in (1, 16, 64, 512, 2048) if series == "race" else (512,):
            yield Row("ssd.prefill", series, T, cases.ssd_prefill(T, [T], G, R, P, N), 5 * T * H * P * N)
        for B in (1, 2, 8, 32) if series == "race" else (1, 8):
            case = cases.ssd_decode(2 * B, B, G, R, P, N, 4, bias=True, norm=True)
            yield Row("ssd.decode", series, B, case, B * H * P * (5 * N + 8))
    for T in (1, 16, 64, 512, 2048):
        yield Row("causal_conv.prefill", "race", T, cases.conv_prefill(T, [T], 1024, 4, False), 8 * T * 1024)
    for B in (1, 2, 8, 32):
        yield Row("causal_conv.update", "race", B, cases.conv_update(B, B, 1024, 4, False), 8 * B * 1024)


def expert_rows() -> Iterator[Row]:
    E, K, H, I = 512, 10, 256, 64
    for N in (1, 2, 8, 32, 128, 512):
        work = 6 * N * K * H * I
        gate = cases.experts(N, N, 32, K, H, I)
        yield Row("moe.experts", "race", N, cases.experts(N, N, E, K, H, I), work, gate, held=(3, 4))
        work += N * (2 * E * H + 6 * H * I)
        gate = cases.mixture(N, min(N, 8), 16, 4, H, I, I)
        yield Row("moe.mixture", "race", N, cases.mixture(N, N, E, K, H, I, I), work, gate, held=(2, 3))


def small_rows() -> Iterator[Row]:
    for N in (1, 8, 64, 512, 2048):
        yield Row("norm.rms_norm", "race", N, cases.rms_norm(N, N, 256), 4 * N * 256)
        yield Row("norm.norm_then_gate", "race", N, cases.norm_then_gate(N, N * 8, 64), 8 * N * 512)
        yield Row("norm.gate_then_norm", "race", N, cases.gate_then_norm(N, N, 1, 512), 8 * N * 512)
        yield Row("rope.rotate", "race", N, cases.rotate(N, N, 8, 64, 8), 6 * N * 8 * 8)
    for N in (1, 2, 8):
        outputs = [1024, 512, 8, 8]
        yield Row("linear.project", "race", N, cases.project(N, N, 256, outputs), 2 * N * 256 * sum(outputs))


def function(op: str, backend: str) -> Callable[..., Any]:
    package, _, name = op.partition(".")
    return getattr(importlib.import_module(f"hybrid_moe_kernels.{package}.{backend}"), name)


def wrong(case: comparison.Case, dtype: torch.dtype) -> str:
    """Compare the native result with the float64 result. Return what is wrong; "" if nothing."""
    try:
        comparison.check(case.rounded(dtype), comparison.module_of(case, "native"), dtype, gap=0)
    except AssertionError as error:
        return str(error)
    return ""


def inputs_of(row: Row, dtype: torch.dtype) -> list[list[Any]]:
    """Make the argument lists of calls that take turns. For `moe` each list chooses other experts."""
    first = row.case.inputs(dtype, "cpu", gap=0)
    if row.op == "moe.experts":
        E = first[3].shape[0]
        return [[*first[:2], (first[2].clamp(0, E - 1) + 61 * turn) % E, *first[3:]] for turn in range(8)]
    if row.op == "moe.mixture":
        router = torch.randn_like(first[1])  # the router of the case makes only two choices
        return [[torch.randn_like(first[0]), router, *first[2:]] for turn in range(8)]
    return [first]


def touched(row: Row, args: list[Any]) -> float:
    """Count the bytes that a call must read or write. Only states of its sequences and chosen experts count."""
    total = 0.0
    flat = itertools.chain.from_iterable(
        [(place, x)] if not isinstance(x, list) else [(place, each) for each in x] for place, x in enumerate(args)
    )
    for place, x in flat:
        if not isinstance(x, Tensor):
            continue
        share = 1.0
        if place in row.case.states:
            share = 2 * args[row.case.states[-1] + 1].numel() / x.shape[0]
        elif place in row.held:
            picks = row.size * (args[2].shape[1] if row.op == "moe.experts" else row.case.options["top_k"])
            share = 1 - (1 - 1 / x.shape[0]) ** picks
        total += share * x.numel() * x.element_size()
    out = row.case.args[0].numel() if row.op != "linear.project" else row.size * sum(row.case.sizes["O"])
    return total + out * args[0].element_size()


def race(
    runners: dict[str, Callable[..., Any]], row: Row, inputs: list[list[Any]], dtype: torch.dtype, budget_s: float
) -> dict[str, float]:
    """Return the microseconds of the fastest call of each runner. Each runner has its own states."""
    turns = {name: itertools.cycle(inputs_of(row, dtype) if row.case.states else inputs) for name in runners}
    best: dict[str, float] = {}
    for name, run in runners.items():
        start = time.perf_counter()
        run(*next(turns[name]), **row.case.options)
        best[name] = time.perf_counter() - start
    first = dict(best)
    for _ in range(ROUNDS):
        for name, run in runners.items():
            repeat = max(1, min(20, int(1e-3 / first[name])))  # short calls go several at a time
            for _ in range(max(1, min(30, int(budget_s / ROUNDS / (repeat * first[name]))))):
                args = [next(turns[name]) for _ in range(repeat)]
                start = time.perf_counter()
                for each in args:
                    run(*each, **row.case.options)
                best[name] = min(best[name], (time.perf_counter() - start) / repeat)
    return {name: seconds * 1e6 for name, seconds in best.items()}


def measure(row: Row, dtype: torch.dtype, peers: dict[str, Any], bandwidth: float, budget_s: float) -> None:
    """Check the row's op, then time it and its peers, and put the figures into `row.result`."""
    row.result["wrong"] = wrong(row.gate or row.case, dtype)
    if row.result["wrong"]:
        return
    runners = {"native": function(row.op, "native"), "torch": function(row.op, "reference")}
    for key, (name, peer) in peers.items():
        if key.partition(" ")[0] == row.op and not (key.endswith("batched_mm") and row.size > 8):
            runners[name] = peer
    theirs = [name for name in runners if name not in ("native", "torch")]
    inputs = inputs_of(row, dtype)
    row.result["bytes"] = touched(row, inputs[0])
    row.result["floor_us"] = row.result["bytes"] / bandwidth * 1e6
    row.result["work"] = row.work
    if theirs:  # how far apart their results are, which shows whether they compute the same
        states = [inputs_of(row, dtype)[0] if row.case.states else inputs[0] for _ in range(2)]
        mine, yours = (
            runners[name](*args, **row.case.options) for name, args in zip(("torch", theirs[0]), states, strict=True)
        )
        row.result["peer_apart"] = comparison.error(yours, mine.double())
    times = race(runners, row, inputs, dtype, budget_s)
    row.result |= {"native_us": times["native"], "torch_us": times["torch"]}
    row.result["torch_ratio"] = times["torch"] / times["native"]
    if theirs:
        row.result["peer"] = min(theirs, key=times.__getitem__)
        row.result["peer_us"] = times[row.result["peer"]]
        row.result["ratio"] = row.result["peer_us"] / times["native"]


def line(row: Row, dtype: str) -> str:
    name, result = f"{row.op:25}{row.series:5}{row.size:6} {dtype:5}", row.result
    if result["wrong"]:
        return f"{name} WRONG: {result['wrong']}"
    peer = f"{result['peer']:24}{result['peer_us']:10.1f} {result['ratio']:6.2f}x" if "peer" in result else ""
    return f"{name}{result['native_us']:10.1f}{result['torch_us']:10.1f} {result['torch_ratio']:6.2f}x  {peer}"


def losses(all_rows: list[dict[str, Any]]) -> list[str]:
    """List where native is slower than torch or the peer.

    A row that is slower by more than noise is listed. An op that is slower on average over its sizes is MISSED.
    """
    lines = [
        f"{row['op']} {row['dtype']} at {row['series']} {row['size']}: {row[against]:.2f} x {name}"
        for row in all_rows
        for against, name in (("torch_ratio", "torch"), ("ratio", "the peer"))
        if row.get(against, 1) < 0.9
    ]
    for op, dtype in sorted({(row["op"], row["dtype"]) for row in all_rows}):
        for against in ("torch_ratio", "ratio"):
            ratios = [row[against] for row in all_rows if (row["op"], row["dtype"]) == (op, dtype) and against in row]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.inf
            if mean < 1:
                peer = "torch" if against == "torch_ratio" else "the peer"
                lines.append(f"{op} {dtype}: {mean:.2f} x {peer} MISSED")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="OP", help="only ops whose name begins with OP")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.05, help="seconds for each implementation of a row")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if torch or the peer is faster")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    lack = native.prepare()
    if lack:
        print(f"bench_kernels: not run: native kernels: {lack}")
        return 0
    peers, lacking = cpu_peers.peers()
    for what in lacking:
        print(f"bench_kernels: not compared: {what}")
    bandwidth, rate = copy_bandwidth(), product_rate()
    document: dict[str, Any] = {
        "hardware": cpu(),
        "instruction_set": native.library().instruction_set(),
        "versions": versions("transformers", "mamba_ssm"),
        "commit": commit(),
        "copy_bytes_per_s": bandwidth,
        "product_per_s": rate,
        "rows": [],
    }
    print(f"{document['hardware']}, {document['instruction_set']}, torch {torch.__version__}, {document['commit'][:9]}")
    print(
        f"copy {bandwidth / 1e9:.1f} GB/s, products {rate / 1e9:.0f} GFLOP/s in float32; microseconds, and times ours"
    )
    print(f"{'op':25}{'':5}{'size':>6} {'dtype':5}{'native':>10}{'torch':>10}          peer")
    with torch.inference_mode():
        for row in rows(args.only):
            for dtype in args.dtype:
                row.result = {}
                measure(row, DTYPES[dtype], peers, bandwidth, args.budget)
                print(line(row, dtype), flush=True)
                about = {"op": row.op, "series": row.series, "size": row.size, "dtype": dtype, "sizes": row.case.sizes}
                document["rows"].append({**about, **row.result})
                if args.json:
                    write(args.json, document)
    document["losses"] = losses(document["rows"])
    for text in document["losses"]:
        print(text)
    if args.json:
        write(args.json, document)
    is_wrong = any(row["wrong"] for row in document["rows"])
    return 1 if is_wrong or (args.strict and any("MISSED" in text for text in document["losses"])) else 0


if __name__ == "__main__":
    sys.exit(main())
