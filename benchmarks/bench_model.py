"""Compare the speed of our model and transformers on the CPU: same weights, prompts and threads, in one process.

    python benchmarks/bench_model.py [--dtype float32 bfloat16] [--kernels torch native] [--threads 2] [--rounds 3]
                                     [--strict] [--json FILE]

It measures a prefill of 512 tokens and the decode steps after it, for batches of 1 and 8 and the preset `race`. Rounds
alternate between the implementations, so that a busy machine slows both, and the fastest round counts. transformers
runs with each of its expert implementations; the fastest one of a phase is the peer. Denormals are flushed for both.
Peak memory is measured in a new process for each implementation. The logits are checked first: the error of our median
token may be 1.5 times that of transformers, both against transformers in float64.

Each ratio that has a mark to reach says whether it did. For a missed mark, the output lists the time in each operation
and outside of all operations. `--strict`: exit status 1 if a mark is missed.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hybrid_moe_kernels import native, registry
from machine import commit, copy_bandwidth, cpu, mark, versions, write

from hybrid_moe_ref import Batch, HybridCache, HybridMoE, ModelConfig, preset
from hybrid_moe_ref.cache.pages import page_layout
from hybrid_moe_ref.commands.comparison import float64_throughout, judge_rounding
from hybrid_moe_ref.generation.greedy import pages_needed, prefill

PROMPT, STEPS = 512, 24
EXPERTS = ("grouped_mm", "eager", "batched_mm")

MARKS: dict[tuple[str, str, int], dict[str, float]] = {
    ("float32", "torch", 1): {"decode_ratio": 2.2, "prefill_ratio": 1.2},
    ("float32", "native", 1): {"decode_ratio": 4.0, "prefill_ratio": 2.0},
    ("bfloat16", "native", 1): {"decode_ratio": 3.6, "prefill_ratio": 3.7},
    ("float32", "native", 8): {"decode_ratio": 3.0},
    ("bfloat16", "native", 8): {"decode_ratio": 3.0},
}
"""The least ratio of transformers' time to ours, by dtype, kernels and batch."""
OVER_FLOOR = 1.6
"""The most that a decode step with native kernels may take over its memory floor, at batch 1."""
PEAK = 1.1
"""The largest ratio of our peak memory to the least of transformers, in float32."""


def build_theirs(config: ModelConfig, dtype: torch.dtype) -> Any:
    sys.modules.setdefault("fla", None)  # type: ignore[arg-type]  # importable without a GPU, it fails when called
    from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

    from hybrid_moe_ref.checkpoint.families import to_json

    raw = to_json(config, "qwen3_5_moe_text", str(dtype).removeprefix("torch."))
    with torch.device("meta"):
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**raw)).to(dtype)
    return model.eval().requires_grad_(False)


def share_weights(ours: HybridMoE, theirs: Any) -> None:
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    rotary = theirs.model.rotary_emb  # its table is not a weight, so it is still on the meta device
    theirs.model.rotary_emb = type(rotary)(theirs.config)


class Ours:
    def __init__(self, model: HybridMoE, batch: int, kernels: str = "torch") -> None:
        self.model, self.batch, self.kernels = model, batch, kernels
        pages = pages_needed(model, [PROMPT + STEPS] * batch)
        self.cache = HybridCache(model.config, pages, dtype=model.dtype)

    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        registry.use(self.kernels)
        self.sequences = [self.cache.allocate() for _ in range(self.batch)]
        return prefill(self.model, list(tokens_BT), self.sequences, self.cache)

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        batch = Batch.of([(sequence, 1) for sequence in self.sequences])
        return self.model.logits(self.model.step(tokens_B, batch, self.cache)).argmax(-1)

    def end(self) -> None:
        for sequence in self.sequences:
            self.cache.free(sequence)


class Theirs:
    def __init__(self, model: Any, experts: str) -> None:
        self.model, self.experts = model, experts

    def prefill(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        self.model.set_experts_implementation(self.experts)
        out = self.model(tokens_BT, use_cache=True, logits_to_keep=1)
        self.past = out.past_key_values
        return out.logits[:, -1].argmax(-1)

    def decode(self, tokens_B: torch.Tensor) -> torch.Tensor:
        out = self.model(tokens_B[:, None], past_key_values=self.past, use_cache=True)
        return out.logits[:, -1].argmax(-1)

    def end(self) -> None:
        del self.past


clock: list[Callable[[], float]] = [time.perf_counter]


def timed(call: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = clock[0]()
    result = call(tokens)
    return 1e3 * (clock[0]() - start), result


def race(runners: dict[str, Any], tokens_BT: torch.Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Return the milliseconds of the fastest prefill and the fastest decode step of each implementation."""
    best = {name: {"prefill_ms": float("inf"), "decode_ms": float("inf")} for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            ms, tokens_B = timed(runner.prefill, tokens_BT)
            best[name]["prefill_ms"] = min(best[name]["prefill_ms"], ms)
            for _ in range(STEPS):
                ms, tokens_B = timed(runner.decode, tokens_B)
                best[name]["decode_ms"] = min(best[name]["decode_ms"], ms)
            runner.end()
    return best


@contextlib.contextmanager
def op_times() -> Iterator[dict[str, list[float]]]:
    """Record the milliseconds of each call of each operation inside the ``with``."""
    times: dict[str, list[float]] = {}
    call = registry.Op.__call__

    def timed_call(op: registry.Op, *args: Any, **options: Any) -> Any:
        start = clock[0]()
        result = call(op, *args, **options)
        times.setdefault(op.name, []).append(1e3 * (clock[0]() - start))
        return result

    registry.Op.__call__ = timed_call  # type: ignore[method-assign]
    try:
        yield times
    finally:
        registry.Op.__call__ = call  # type: ignore[method-assign]


def profile(runner: Ours, tokens_BT: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return the milliseconds of the fastest prefill and decode step in each operation, and outside of all operations.

    The cost of the clock is included. An operation that runs inside another one counts as the outer one.
    """
    quickest: dict[str, dict[str, float]] = {}
    tokens_B = tokens_BT
    for phase, call, count in (("prefill", runner.prefill, 1), ("decode", runner.decode, STEPS)):
        for _ in range(count):
            with op_times() as times:
                ms, tokens_B = timed(call, tokens_B)
            if ms < quickest.get(phase, {"whole": float("inf")})["whole"]:
                parts = {name: sum(each) for name, each in times.items()}
                ordered = dict(sorted(parts.items(), key=lambda part: -part[1]))
                quickest[phase] = {"whole": ms, **ordered, "outside": ms - sum(parts.values())}
    runner.end()
    return quickest


def floor_ms(model: HybridMoE, batch: int) -> float:
    """Return the milliseconds that a copy of the weights and states of a decode step takes."""
    config, touched = model.config, 0.0
    expected = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** batch  # the expected share of the experts
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            touched += parameter.numel() * parameter.itemsize * (expected if ".experts." in name else 1)
    layout = page_layout(config, model.dtype.itemsize)
    for kind in config.layer_pattern:
        if kind == "A":
            touched += batch * PROMPT * 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        else:
            touched += 2 * batch * layout.states[kind].num_bytes  # read and written
    return 1e3 * touched / copy_bandwidth()


def peak_mib(which: str, dtype: str, threads: int) -> float:
    """Return the peak resident MiB of a new process that makes a model with random weights, prefills and decodes."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", which, "--dtype", dtype, "--threads", str(threads)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def print_peak(which: str, config: ModelConfig, dtype: torch.dtype) -> None:
    if which.startswith("ours"):
        kernels = which.removeprefix("ours ")
        runner: Any = Ours(HybridMoE(config, device="meta", dtype=dtype).init_weights(0), 1, kernels)
    else:
        theirs = build_theirs(config, dtype).to_empty(device="cpu")
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
        for parameter in theirs.parameters():
            parameter.normal_(std=0.02)
        runner = Theirs(theirs, which)
    tokens_B = runner.prefill(torch.zeros(1, PROMPT, dtype=torch.long))
    for _ in range(STEPS):
        tokens_B = runner.decode(tokens_B)
    # Not getrusage: its maximum survives exec, so a child would report its parent's.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def check_logits(ours: HybridMoE, theirs: Any, kernels: list[str], tokens_1T: torch.Tensor) -> dict[str, Any]:
    """Return the error of each implementation's median token against the float64 logits.

    Raises AssertionError if ours is more than `comparison.FACTOR` times that of transformers.
    """
    exact = build_theirs(ours.config, torch.float64)
    exact.load_state_dict({name: x.double() for name, x in ours.state_dict().items()}, strict=True, assign=True)
    exact.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    exact.set_experts_implementation("eager")  # the default does not support float64
    with float64_throughout(exact):
        truth_1TV = exact(tokens_1T, use_cache=False).logits
    theirs_1TV = theirs(tokens_1T, use_cache=False).logits
    judged = {}
    for name in kernels:
        with registry.using(name):
            judged[name] = judge_rounding(ours(tokens_1T), theirs_1TV, truth_1TV)
        assert judged[name]["agrees"], f"the logits of {name} are too far from the truth, {judged[name]}: no race"
    return judged


def one_row(
    ours: HybridMoE, theirs: Any, args: argparse.Namespace, tokens_BT: torch.Tensor, missed: list[str]
) -> dict[str, Any]:
    """Measure one batch: the times of all implementations, and our ratios with their marks."""
    batch, dtype = tokens_BT.shape[0], str(ours.dtype).removeprefix("torch.")
    runners: dict[str, Any] = {f"ours {kernels}": Ours(ours, batch, kernels) for kernels in args.kernels}
    runners |= {name: Theirs(theirs, name) for name in args.experts}
    times = race(runners, tokens_BT, args.rounds)
    row: dict[str, Any] = {"dtype": dtype, "batch": batch, "times": times, "decode_floor_ms": floor_ms(ours, batch)}
    for name, result in times.items():
        line = f"prefill {result['prefill_ms']:8.1f} ms   decode {result['decode_ms']:6.2f} ms"
        print(f"{dtype} batch {batch}  {name:12} {line}", flush=True)
    for kernels in args.kernels:
        lines = []
        for phase in ("prefill", "decode"):
            best = min(times[name][f"{phase}_ms"] for name in args.experts)
            ratio = row[f"{kernels}_{phase}_ratio"] = best / times[f"ours {kernels}"][f"{phase}_ms"]
            wanted = MARKS.get((dtype, kernels, batch), {}).get(f"{phase}_ratio")
            lines.append(f"{phase} {ratio:.2f}" + (f" ({mark(ratio, wanted)})" if wanted else ""))
        over = row[f"{kernels}_decode_over_floor"] = times[f"ours {kernels}"]["decode_ms"] / row["decode_floor_ms"]
        wanted = f" ({mark(over, OVER_FLOOR, at_most=True)})" if kernels == "native" and batch == 1 else ""
        lines.append(f"decode {over:.2f} x its memory floor{wanted}")
        print(f"{dtype} batch {batch}  best of transformers / ours {kernels}: {', '.join(lines)}", flush=True)
        row[f"{kernels}_profile_ms"] = parts = profile(runners[f"ours {kernels}"], tokens_BT)
        for text in lines:
            if "MISSED" in text:
                missed.append(f"{dtype} batch {batch} {kernels}: {text}")
                spent = (f"{what} {ms:.2f}" for what, ms in parts[text.split()[0]].items())
                print(f"    {text.split()[0]}, where the time goes, ms: {', '.join(spent)}", flush=True)
    return row


def peaks(args: argparse.Namespace, dtype: str, missed: list[str]) -> dict[str, float]:
    """Measure the peak memory of each implementation in MiB; append what misses its mark to `missed`."""
    peak_of = {f"ours {name}": peak_mib(f"ours {name}", dtype, args.threads) for name in args.kernels}
    peak_of |= {name: peak_mib(name, dtype, args.threads) for name in args.experts}
    least = min(peak_of[name] for name in args.experts)
    for name, value in peak_of.items():
        line = f"{dtype} peak {value:.0f} MiB {name}"
        if name.startswith("ours") and dtype == "float32":
            line += f": {value / least:.2f} of transformers' least ({mark(value / least, PEAK, at_most=True)})"
            missed.extend([line] if "MISSED" in line else [])
        print(line, flush=True)
    return peak_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--kernels", nargs="+", choices=("torch", "native"), default=["torch", "native"])
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread: what others do on the machine counts less"
    )
    parser.add_argument("--strict", action="store_true", help="exit status 1 where a mark is missed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cpu_time:
        clock[0], args.threads = time.process_time, 1
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.peak:
        with torch.inference_mode():
            print_peak(args.peak, preset("race"), getattr(torch, args.dtype[0]))
        return 0
    if "native" in args.kernels:
        registry.use("native")
        if native.missing():  # the registry has logged why
            args.kernels.remove("native")
    record: dict[str, Any] = {
        "hardware": cpu(),
        "instruction_set": native.library().instruction_set() if "native" in args.kernels else "",
        "versions": versions("transformers"),
        "commit": commit(),
        "clock": "CPU time" if args.cpu_time else "wall",
        "prompt_tokens": PROMPT,
        "picked": {},
        "right": {},
        "rows": [],
        "peak_mib": {},
    }
    print(f"{record['hardware']}, {record['instruction_set']}, {record['versions']}, {record['commit'][:9]}")
    missed: list[str] = []
    for dtype in args.dtype:
        with torch.inference_mode():
            ours = HybridMoE(preset("race"), device="meta", dtype=getattr(torch, dtype)).init_weights(0)
            theirs = build_theirs(ours.config, ours.dtype)
            share_weights(ours, theirs)
            for kernels in args.kernels:
                with registry.using(kernels):
                    record["picked"][f"{dtype} {kernels}"] = registry.table("cpu", ours.dtype)
            r = torch.Generator().manual_seed(1)
            tokens_1T = torch.randint(ours.config.vocab_size, (1, PROMPT), generator=r)
            record["right"][dtype] = check_logits(ours, theirs, args.kernels, tokens_1T)
            for batch in args.batch:
                tokens_BT = torch.randint(ours.config.vocab_size, (batch, PROMPT), generator=r)
                record["rows"].append(one_row(ours, theirs, args, tokens_BT, missed))
        del ours, theirs  # before other processes are measured for their memory
        record["peak_mib"][dtype] = peaks(args, dtype, missed)
        if args.json:
            write(args.json, record)
    record["missed"] = missed
    print("\n".join(f"MISSED {text}" for text in missed) or "no mark missed")
    if args.json:
        write(args.json, record)
    return 1 if missed and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
